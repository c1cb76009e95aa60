"""Files of tensors, and maps between the names and layouts of other projects and ours.

`diffusers` and `original` hold the maps by project, and `transformers_text` those of text encoders.
The maps are pure functions between trees of NumPy arrays, and account for every tensor.
"""
