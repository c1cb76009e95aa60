"""Metrics of images, of sets of images and of models."""
