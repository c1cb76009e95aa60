"""Layer-to-layer alignment: features follow those of a later layer of the same network.

    L = 1 - mean_i cos(h_i, sg(z_i))                                                        (1)

h are the features of `tap`, z those of `target_tap`, and sg stops the gradient. There are no
parameters. Source: Haghighi et al. 2025, "LayerSync" (arXiv 2510.12581).
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Key

from conprediff_jax.common.errors import FieldError
from conprediff_jax.objectives.heads import cosine_distance, resized
from conprediff_jax.objectives.term import TERMS, Evaluated, Seen, Term


@TERMS.register("layer_alignment")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerAlignment(Term):
    """Alignment of one layer with another one, equation (1).

    Attributes:
        tap: The name of the features that follow.
        target_tap: The name of the features that they follow, which have as many channels. If their
            grid is another one, they are interpolated.
    """

    tap: str = "middle"
    target_tap: str = "output"

    def __post_init__(self):
        super().__post_init__()
        if self.tap == self.target_tap:
            raise FieldError("target_tap", f"is {self.tap!r}, as tap is: features follow others")

    @property
    def taps(self) -> tuple[str, ...]:
        """Both taps."""
        return self.tap, self.target_tap

    def init_params(self, rng: Key[Array, ""], shapes: Seen) -> Any:
        """Returns no parameters.

        Raises:
            FieldError: The taps have different numbers of channels.
        """
        del rng
        h, z = (shapes.taps[name] for name in self.taps)
        if h.shape[-1] != z.shape[-1]:
            raise FieldError(
                "target_tap",
                f"is {self.target_tap!r}, of {z.shape[-1]} channels: it needs {h.shape[-1]}, as "
                f"tap {self.tap!r} has",
            )
        return {}

    def evaluate(self, params: Any, seen: Seen) -> Evaluated:
        """Returns (1)."""
        del params
        h, z = (seen.taps[name] for name in self.taps)
        z = jax.lax.stop_gradient(resized(z, h.shape[1:-1]))
        return self.mean_distance(cosine_distance(h, z), seen)
