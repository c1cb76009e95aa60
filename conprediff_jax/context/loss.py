"""The context loss: its settings, its decoder and its value.

    L_context = lambda_t * mean_i sum_s w_s D(y_i^s, t_i^s)                                (1)

Here i is a point, s a stride, y the neighbours that the decoder predicts, and t the Q clean
neighbours drawn from x_0. D is the transport distance for the distribution decoder, and the mean
squared error over all true neighbours for the direct decoder.

Source: arXiv 2401.02015, section 3. The paper has a time-dependent lambda_t in [0, 1] and does not
give its schedule.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int, Key, Real

from conprediff_jax.context import neighborhood, transport
from conprediff_jax.context.head import DirectDecoder, DistributionDecoder

DECODERS = ("distribution", "direct")
TIME_WEIGHTINGS = ("constant", "signal", "snr")
SOURCES = ("features", "prediction")
Time = Real[Array, "batch"]
_SHAPES = ("features", "channels", "dimensions")


class ContextLoss(NamedTuple):
    """The results of `ContextPrediction.loss` for every example, float32.

    Attributes:
        weighted: Equation (1).
        distance: The unweighted D, its mean over the points, with one column per stride.
    """

    weighted: Float[Array, "batch"]
    distance: Float[Array, "batch strides"]


# Roles of fields, for the code that builds a config. They are those of `common.keys`, written out
# because this folder does not import that module.
def _fixed(default: Any) -> Any:
    """A field that the decoder's parameters depend on."""
    return dataclasses.field(default=default, metadata={"role": "fixed"})


def _switch(default: Any) -> Any:
    """A field that decides whether there is a decoder: there is none where the value is 0."""
    return dataclasses.field(default=default, metadata={"role": "switch"})


def _derived(default: Any = dataclasses.MISSING) -> Any:
    """A field that the caller fills in from other settings; it is not a key of a config."""
    return dataclasses.field(default=default, metadata={"role": "derived"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextPrediction:
    """The settings of context prediction, its decoder, and the loss that it adds.

    Attributes:
        strides: The Chebyshev radii of the neighbourhoods.
        stride_weights: w_s. None means 1 / (number of strides) for every stride.
        samples: Q, the number of points that represent one distribution.
        points_per_example: The number of points at which the loss is computed, drawn anew at every
            step; 0 means all points. The expected loss is the same.
        decoder: 'distribution', or 'direct' for the baseline, which uses no transport distance.
        transport: The transport distance: 'sinkhorn', 'exact', 'sinkhorn_divergence' or 'gaussian';
            see `transport`.
        epsilon: The entropic regularisation relative to the mean cost. Only 'sinkhorn' and
            'sinkhorn_divergence' use it.
        iterations: The number of Sinkhorn iterations. Only 'sinkhorn' and 'sinkhorn_divergence'
            use it.
        weight: lambda. At 0 there is no context prediction. The default is the weight that was
            found best for pixels (docs/results.md).
        warmup_steps: The number of training steps over which the weight rises linearly from 0.
        time_weighting: How lambda_t depends on t: 'constant' is lambda, 'signal' is
            lambda * alpha_bar_t, and 'snr' is lambda * min(1, SNR_t).
        source: What the decoder reads: the denoiser's 'features' or its 'prediction' of x_0. The
            caller passes one or the other as h.
        hidden: The width of the decoder.
        latent: The number of dimensions of the Gaussian.
        dtype: The dtype of the decoder's activations.
        share: A function from times t to their position between the clean end, 0, and the noisy
            end, 1. It is t / T for a process of T steps.
        alpha_bar: A function from times t to the kept signal alpha_bar_t in [0, 1].

    Raises:
        ValueError: A field is out of range; the message names the field.
    """

    strides: tuple[int, ...] = _fixed((1, 2, 3))
    stride_weights: tuple[float, ...] | None = None
    samples: int = 8
    points_per_example: int = 0
    decoder: str = _fixed("distribution")
    transport: str = "sinkhorn"
    epsilon: float = 0.05
    iterations: int = 20
    weight: float = _switch(0.09)
    warmup_steps: int = 500
    time_weighting: str = "constant"
    source: str = _fixed("features")
    hidden: int = _fixed(128)
    latent: int = _fixed(32)
    dtype: DTypeLike = _derived(jnp.float32)
    share: Callable[[Time], Float[Array, "batch"]] = _derived()
    alpha_bar: Callable[[Time], Float[Array, "batch"]] = _derived()

    def __post_init__(self):
        for name, choices in (
            ("decoder", DECODERS),
            ("transport", tuple(transport.TRANSPORTS)),
            ("time_weighting", TIME_WEIGHTINGS),
            ("source", SOURCES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {choices}")
        if not self.strides or min(self.strides) < 1:
            raise ValueError(f"strides are {self.strides}: give radii of at least 1")
        if self.stride_weights and len(self.stride_weights) != len(self.strides):
            raise ValueError(
                f"stride_weights has {len(self.stride_weights)} entries for "
                f"{len(self.strides)} strides: give one a stride"
            )
        if self.stride_weights and not (min(self.stride_weights) >= 0 < sum(self.stride_weights)):
            raise ValueError(
                f"stride_weights are {self.stride_weights}: none may be negative, nor all be 0"
            )
        for name in ("samples", "iterations", "hidden", "latent"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("weight", "points_per_example", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be negative")
        if self.epsilon <= 0:
            raise ValueError(f"epsilon is {self.epsilon}: it must be positive")

    @property
    def distance(self) -> Callable[..., Float[Array, "..."]]:
        """The transport distance D: a function of two arrays `[..., Q, C]` that returns `[...]`."""
        distance = transport.TRANSPORTS[self.transport]
        if self.transport.startswith("sinkhorn"):
            settings = {"epsilon": self.epsilon, "iterations": self.iterations}
            distance = functools.partial(distance, **settings)
        return distance

    @functools.partial(jax.jit, static_argnums=0, static_argnames=_SHAPES)
    def init(
        self, rng: Key[Array, ""], *, features: int, channels: int, dimensions: int = 2
    ) -> Any:
        """Returns initial parameters of the decoder, float32.

        Args:
            rng: The key that draws the initial values.
            features: The number of channels of h.
            channels: The number of channels of x_0.
            dimensions: The number of axes of the grid. Only the parameters of the direct decoder
                depend on it.
        """
        h, time = jnp.zeros((1, 1, features)), jnp.zeros(1)
        if self.decoder == "direct":
            return self._direct(channels, dimensions).init(rng, h, time)["params"]
        noise = jnp.zeros((1, 1, len(self.strides), 1, self.latent))
        return self._distribution(channels).init(rng, h, time, noise)["params"]

    @functools.partial(jax.jit, static_argnums=0)
    def loss(
        self,
        params: Any,
        h: Float[Array, "batch *grid features"],
        x_0: Float[Array, "batch *grid channels"],
        t: Time,
        rngs: Key[Array, "batch"],
    ) -> ContextLoss:
        """Computes the context loss (1) from representations and clean points.

        Args:
            params: The parameters of the decoder, from `init`.
            h: The representation of every point. Gradients flow into it.
            x_0: The clean points on the same grid, which has any number of axes, at a scale of
                about 1: pixels in [-1, 1], latents or codes of deviation 1. The loss grows with
                the square of the scale, and `weight` is meant for this one. No gradient flows into
                them.
            t: Diffusion times, which `share` and `alpha_bar` read.
            rngs: One key for every example, so that the draws do not depend on how a batch is
                split.

        Returns:
            The losses of every example. The mean of `weighted` over the batch is the term to add to
            the training loss.

        Raises:
            ValueError: h and x_0 lie on different grids, or the grid has a single point.
        """
        if h.shape[:-1] != x_0.shape[:-1]:
            raise ValueError(
                f"h has the shape {h.shape} and x_0 {x_0.shape}: batch and grid, all axes but the "
                "last, must be the same; take h where it has the grid of x_0, or resize it"
            )
        grid = x_0.shape[1:-1]
        num_points = int(np.prod(grid))
        h = h.reshape(len(h), num_points, -1)
        x_0 = jax.lax.stop_gradient(x_0.astype(jnp.float32)).reshape(len(h), num_points, -1)
        keys = jax.vmap(lambda rng: jax.random.split(rng, 3))(rngs)
        if 0 < self.points_per_example < num_points:
            points = neighborhood.draw_points(keys[:, 0], num_points, self.points_per_example)
            h = neighborhood.gather_points(h, points)
        else:
            points = jnp.broadcast_to(jnp.arange(num_points), (len(h), num_points))
        time = self.share(t)
        if self.decoder == "direct":
            distance = self._direct_distance(params, h, x_0, time, points, grid)
        else:
            distance = self._transport_distance(params, h, x_0, time, points, grid, keys[:, 1:])
        weights = self.stride_weights or (1 / len(self.strides),) * len(self.strides)
        return ContextLoss(self.time_weight(t) * (distance @ jnp.asarray(weights)), distance)

    def time_weight(self, t: Time) -> Float[Array, "batch"]:
        """Returns lambda_t; see `time_weighting`."""
        alpha_bar = self.alpha_bar(t)
        if self.time_weighting == "signal":
            return self.weight * alpha_bar
        if self.time_weighting == "snr":
            # min(1, SNR) = min(1, a / (1 - a)), written without the division by zero at a = 1.
            return self.weight * alpha_bar / jnp.maximum(1 - alpha_bar, alpha_bar)
        return self.weight * jnp.ones_like(alpha_bar)

    def warmup(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """Returns the factor in [0, 1] by which the loss is multiplied at a training step."""
        return jnp.minimum(1.0, step / self.warmup_steps) if self.warmup_steps else jnp.ones(())

    def _distribution(self, channels: int) -> nn.Module:
        return DistributionDecoder(channels, len(self.strides), self.hidden, self.dtype)

    def _direct(self, channels: int, dimensions: int) -> nn.Module:
        neighbors = tuple((2 * s + 1) ** dimensions - 1 for s in self.strides)
        return DirectDecoder(channels, neighbors, self.hidden, self.dtype)

    def _transport_distance(self, params, h, x_0, time, points, grid, keys):
        """Returns the mean transport distance for each stride, `[batch, strides]`."""
        shape = (points.shape[1], len(self.strides), self.samples, self.latent)
        noise = jax.vmap(lambda rng: jax.random.normal(rng, shape, self.dtype))(keys[:, 0])
        decoder = self._distribution(x_0.shape[-1])
        predicted = decoder.apply({"params": params}, h, time, noise)
        neighbors = neighborhood.draw_neighbors(
            keys[:, 1], points, grid=grid, strides=self.strides, samples=self.samples
        )
        return self.distance(predicted, neighborhood.gather_points(x_0, neighbors)).mean(1)

    def _direct_distance(self, params, h, x_0, time, points, grid):
        """Returns the mean squared error over true neighbours, `[batch, strides]`."""
        decoder = self._direct(x_0.shape[-1], len(grid))
        columns = []
        for stride, predicted in zip(
            self.strides, decoder.apply({"params": params}, h, time), strict=True
        ):
            indices, valid = neighborhood.ordered_neighbors(points, grid=grid, stride=stride)
            target = neighborhood.gather_points(x_0, indices)
            error = jnp.square(predicted - target).mean(-1)
            columns.append(jnp.mean(error, axis=(1, 2), where=valid))
        return jnp.stack(columns, axis=-1)
