"""Maps between diffusers' parameters and configs and ours."""
