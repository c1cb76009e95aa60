"""Alignment with the features of a frozen encoder, which were encoded ahead of training.

    L = 1 - mean_i cos(head(h, t)_i, z_i)                                                   (1)

z are the features of the clean image that the data hold. Source: Yu et al. 2024, "REPA" (arXiv
2410.06940). Where the grids differ, the head comes first and its answer is interpolated, as in
U-REPA (arXiv 2503.18414). Unlike there, the head reads the diffusion time.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from conprediff_jax.common.fields import require
from conprediff_jax.context.weighting import fixed
from conprediff_jax.objectives.heads import Head, cosine_distance, resized
from conprediff_jax.objectives.term import TERMS, Evaluated, Seen, Term


@TERMS.register("encoder_alignment")
@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderAlignment(Term):
    """Alignment with the features of an encoder, equation (1).

    Attributes:
        tap: The name of the features that the head reads.
        shape: The rows, columns and channels of the encoder's features; the default are those of
            DINOv2-B at 224 x 224 pixels.
        hidden: The width of the head.
        depth: The number of hidden layers of the head.
        kernel: The side of the window of cells that its first layer reads, an odd number.
        normalised: Whether the features are normalised over space, with mean 0 and deviation 1 in
            every channel of an example, as in iREPA (2025).
    """

    tap: str = fixed("output")
    shape: tuple[int, ...] = fixed((16, 16, 768))
    hidden: int = fixed(512)
    depth: int = fixed(2)
    kernel: int = fixed(1)
    normalised: bool = fixed(False)

    reads_encoded = True

    def __post_init__(self):
        super().__post_init__()
        require(self, lambda n: n >= 1, "be at least 1", "hidden", "depth")
        require(self, lambda n: n % 2 == 1, "be odd and positive", "kernel")
        require(self, lambda n: len(n) == 3 and min(n) >= 1, "have three sizes", "shape")

    @property
    def taps(self) -> tuple[str, ...]:
        """The tap."""
        return (self.tap,)

    def _head(self, channels: int) -> Head:
        return Head(channels, self.hidden, self.depth, self.kernel, self.dtype)

    def init_params(self, rng: Key[Array, ""], shapes: Seen) -> Any:
        """Returns initial parameters of the head."""
        head, h = self._head(self.shape[-1]), shapes.taps[self.tap]
        return head.init(rng, jnp.zeros(h.shape, h.dtype), jnp.zeros(h.shape[:1]))["params"]

    def evaluate(self, params: Any, seen: Seen) -> Evaluated:
        """Returns (1)."""
        target = jax.lax.stop_gradient(seen.encoded.astype(jnp.float32))
        if self.normalised:
            target = jax.nn.standardize(target, axis=tuple(range(1, target.ndim - 1)))
        head = self._head(target.shape[-1])
        answer = head.apply({"params": params}, seen.taps[self.tap], self.share(seen.t))
        distance = cosine_distance(resized(answer, target.shape[1:-1]), target)
        return self.mean_distance(distance, seen)
