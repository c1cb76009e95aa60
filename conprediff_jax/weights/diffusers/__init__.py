"""Maps between diffusers' parameters and ours."""
