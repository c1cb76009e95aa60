"""Other people's weights: files of tensors, and maps from their names to ours."""
