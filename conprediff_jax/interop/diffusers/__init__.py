"""Whole pipelines of diffusers, read and written."""
