"""Plans: what a config will need on a TPU slice that you do not have.

`plans` compiles an experiment for a slice (`topology`) and makes an `account` of each program: its
memory, FLOPs, traffic to memory and between chips, and a lower bound of its run time.
"""
