"""Flax modules: denoisers, first-stage autoencoders and text encoders."""
