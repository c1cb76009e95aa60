"""Plans: what a program will need and do on a machine that is not there.

`plans` compiles an experiment for a `topology` and makes an `account` of every program: memory,
FLOPs, traffic to memory and between chips, and the step time that the `chips` allow at best.
"""
