"""Readers of published checkpoints, in the files that their authors wrote."""
