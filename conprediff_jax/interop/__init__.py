"""Readers and writers of whole models: a config together with the weights of its networks.

`diffusers` reads and writes diffusers' pipelines, and `original` reads the files of other projects.
`formats` knows all formats by name.
"""
