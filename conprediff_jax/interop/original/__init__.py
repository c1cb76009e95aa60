"""Published checkpoints as their authors wrote them, read."""
