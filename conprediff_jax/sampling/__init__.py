"""Diffusion models, and drawing images and fillings from them."""
