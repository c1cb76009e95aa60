"""The parts of `benchmarks/ablation.py`: runs and their order, what is measured, what is said."""
