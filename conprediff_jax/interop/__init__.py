"""Other people's checkpoint formats, one file a family: pure maps between trees of arrays."""
