"""Context decoders: from a point's representation to its neighbourhood.

The distribution decoder (arXiv 2401.02015, section 3; NWR-GAE, arXiv 2202.09025) maps the
representation h_i to a diagonal Gaussian and passes Q samples of it through a network:

    xi_ij = mu(h_i) + sigma(h_i) * eps_ij,    eps_ij ~ N(0, I),    j = 1..Q               (1)
    y_ij  = FNN_out(xi_ij)                                                                (2)

One decoder serves all strides. It reads a learned embedding of the stride, so its cost does not
depend on the stride; the diffusion time enters through an adaptive scale and shift. The direct
decoder `h -> K_s x C` is the baseline: it predicts the ordered neighbours themselves, so on images
it grows with the square of the stride.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from conprediff_jax.common import linear

# This range keeps exp(log sigma) and its slope finite for every output of the trunk.
_LOG_SIGMA_RANGE = (-7.0, 2.0)


class DistributionDecoder(nn.Module):
    """Draws Q predicted neighbours for every point and stride, equations (1) and (2).

    Attributes:
        channels: C, the number of channels of a target point.
        strides: The number of strides.
        hidden: The width of the hidden layers.
        depth: The number of hidden layers before the Gaussian.
        dtype: The dtype of the activations. Parameters and the result are float32.
    """

    channels: int
    strides: int
    hidden: int = 128
    depth: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        h: Float[Array, "batch cells *window features"],
        time: Float[Array, "batch"],
        noise: Float[Array, "batch points strides samples latent"],
        bring_up: Callable[[Array], Array] = lambda hidden: hidden,
    ) -> Float[Array, "batch points strides samples channels"]:
        """Returns the predicted neighbours.

        Args:
            h: The representations of the points, or of the cells of a coarser grid; see `Trunk`.
            time: The position of the diffusion time between the clean end, 0, and the noisy end, 1.
            noise: eps of equation (1), standard normal.
            bring_up: A function from values of cells to values of points, by interpolation. It
                takes the last hidden layer, so it interpolates mu and log sigma.
        """
        latent = noise.shape[-1]
        trunk = Trunk(self.strides, self.hidden, self.depth, self.dtype, name="trunk")
        hidden = bring_up(trunk(h, time))
        mu = linear.Dense(latent, dtype=self.dtype, name="mu")(hidden)
        log_sigma = linear.Dense(
            latent, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="log_sigma"
        )(hidden)
        sigma = jnp.exp(jnp.clip(log_sigma, *_LOG_SIGMA_RANGE))
        xi = mu[..., None, :] + sigma[..., None, :] * noise.astype(self.dtype)
        xi = nn.silu(linear.Dense(self.hidden, dtype=self.dtype, name="out_hidden")(xi))
        return linear.Dense(self.channels, dtype=self.dtype, name="out")(xi).astype(jnp.float32)


class DirectDecoder(nn.Module):
    """Predicts every neighbour at its place in the window, with one output layer per stride.

    Attributes:
        channels: C, the number of channels of a target point.
        neighbors: K_s, the number of neighbours, for each stride.
        hidden: The width of the hidden layers.
        depth: The number of hidden layers.
        dtype: The dtype of the activations. Parameters and the result are float32.
    """

    channels: int
    neighbors: tuple[int, ...]
    hidden: int = 128
    depth: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        h: Float[Array, "batch cells *window features"],
        time: Float[Array, "batch"],
        bring_up: Callable[[Array], Array] = lambda hidden: hidden,
    ) -> list[Float[Array, "batch points neighbors channels"]]:
        """Returns the neighbours for each stride, in the order of `ordered_neighbors`.

        Arguments are those of `DistributionDecoder`.
        """
        trunk = Trunk(len(self.neighbors), self.hidden, self.depth, self.dtype, name="trunk")
        hidden = bring_up(trunk(h, time))
        predicted = []
        for index, count in enumerate(self.neighbors):
            layer = linear.Dense(count * self.channels, dtype=self.dtype, name=f"out_{index}")
            flat = layer(hidden[:, :, index]).astype(jnp.float32)
            predicted.append(flat.reshape(*flat.shape[:2], count, self.channels))
        return predicted


class Trunk(nn.Module):
    """Hidden layers on the normalised h, the last one modulated by the stride and the time.

    Attributes:
        strides: The number of strides, each with a learned embedding.
        hidden: The width of the hidden layers.
        depth: Their number; all but the last one are added to their input.
        dtype: The dtype of the activations.
    """

    strides: int
    hidden: int
    depth: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, h: Float[Array, "batch points *window features"], time: Float[Array, "batch"]
    ) -> Float[Array, "batch points strides hidden"]:
        """Returns the last hidden layer.

        Args:
            h: The representations of points, or of windows of cells around them. Cells outside the
                grid are 0, and the norm leaves them so.
            time: The position of the diffusion time between the clean end, 0, and the noisy end, 1.
        """
        h = nn.LayerNorm(use_bias=False, use_scale=False, dtype=jnp.float32)(h)
        h = h.reshape(*h.shape[:2], -1)
        h = linear.Dense(self.hidden, dtype=self.dtype, name="in")(h)
        for i in range(self.depth - 1):
            h = h + linear.Dense(self.hidden, dtype=self.dtype, name=f"hidden_{i}")(nn.silu(h))
        h = h[:, :, None]
        stride = self.param(
            "stride_embedding", nn.initializers.normal(1.0), (self.strides, self.hidden)
        )
        when = linear.Dense(self.hidden, dtype=self.dtype, name="time")(_time_features(time))
        condition = nn.silu(when[:, None] + stride)
        modulation = linear.Dense(2 * self.hidden, dtype=self.dtype, name="modulation")(condition)
        scale, shift = jnp.split(modulation[:, None], 2, axis=-1)
        return nn.silu(h * (1 + scale) + shift)


def _time_features(
    time: Float[Array, "batch"], frequencies: int = 16
) -> Float[Array, "batch {2*frequencies}"]:
    """Cosines and sines of `time` in [0, 1], with frequencies from 1 to 1000 radians."""
    angles = time[:, None] * jnp.geomspace(1.0, 1000.0, frequencies)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
