"""Maps between the parameters of published checkpoints and ours."""
