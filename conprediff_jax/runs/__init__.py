"""Reading and writing the workdir of a run: checkpoints, and models for use."""
