"""Maps from the parameters of published checkpoints, by their original names, to ours."""
