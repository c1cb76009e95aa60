"""Distances between images and between sets of images."""
