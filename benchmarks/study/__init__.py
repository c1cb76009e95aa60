"""What benchmarks share: the parts of `ablation.py`, timed steps, and metrics of their own."""
