"""ConPreDiff in JAX: diffusion models that learn to predict the context of every point.

`load` opens a trained model, for example in a notebook; see `conprediff_jax.runs.api`.

Source: *Improving Diffusion-Based Image Synthesis with Context Prediction*, NeurIPS 2023,
arXiv 2401.02015.
"""

from typing import Any

from conprediff_jax.common import starting

if starting.is_command(__name__):
    starting.answer_ctrl_c()


def __getattr__(name: str) -> Any:
    """Imports `load` when it is first used: `import conprediff_jax` alone does not import JAX."""
    if name == "load":
        from conprediff_jax.runs.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
