"""Readers and writers of diffusers' pipelines."""
