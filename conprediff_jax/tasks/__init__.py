"""What a training step computes, for each kind of model."""
