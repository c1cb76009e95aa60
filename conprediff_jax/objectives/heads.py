"""A head that maps features of a tap to what they should predict, and changes of its grid."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from conprediff_jax.common import linear
from conprediff_jax.context import grids
from conprediff_jax.context.head import Trunk

Map = Float[Array, "batch *cells channels"]


class Head(nn.Module):
    """Hidden layers on the normalised features, modulated by the diffusion time, and an output.

    Attributes:
        channels: The number of channels of the answer.
        hidden: The width of the hidden layers.
        depth: Their number.
        kernel: The side of the window that the first layer reads, an odd number.
        dtype: The dtype of the activations. Parameters and the answer are float32.
    """

    channels: int
    hidden: int
    depth: int
    kernel: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, h: Float[Array, "batch *cells features"], time: Float[Array, "batch"]
    ) -> Float[Array, "batch *cells {self.channels}"]:
        """Maps every cell to its answer, given times between the clean end, 0, and the noisy, 1."""
        cells = h.shape[1:-1]
        flat = h.reshape(len(h), -1, h.shape[-1])
        if self.kernel > 1:
            every = jnp.broadcast_to(jnp.arange(flat.shape[1]), flat.shape[:2])
            flat = grids.windows(flat, every, grid=cells, side=self.kernel)
        hidden = Trunk(1, self.hidden, self.depth, self.dtype, name="trunk")(flat, time)[:, :, 0]
        answer = linear.Dense(self.channels, dtype=self.dtype, name="out")(hidden)
        return answer.astype(jnp.float32).reshape(len(h), *cells, self.channels)


def resized(x: Map, grid: tuple[int, ...]) -> Float[Array, "batch *grid channels"]:
    """Interpolates a map linearly to another grid; a finer one is averaged rather than sampled."""
    if x.shape[1:-1] == grid:
        return x
    return jax.image.resize(x, (len(x), *grid, x.shape[-1]), "linear")


def cosine_distance(
    a: Float[Array, "batch *cells channels"], b: Float[Array, "batch *cells channels"]
) -> Float[Array, "batch"]:
    """Returns 1 minus the cosine between the vectors of every cell, its mean over the cells."""

    def unit(x: Map) -> Map:
        x = x.astype(jnp.float32)
        # A constant under the root keeps its slope finite where a vector is 0.
        return x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)

    distance = 1 - (unit(a) * unit(b)).sum(-1)
    return distance.reshape(len(a), -1).mean(1)
