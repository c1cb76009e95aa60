"""Modules that every layer may use: errors, files, images, progress lines, random streams."""
