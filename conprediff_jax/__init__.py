"""ConPreDiff in JAX: diffusion models that learn to predict the context of every point.

Source: *Improving Diffusion-Based Image Synthesis with Context Prediction*, NeurIPS 2023,
arXiv 2401.02015.
"""
