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
from jaxtyping import Array, Bool, Float, Key

from conprediff_jax.context import grids, neighborhood, transport
from conprediff_jax.context.head import DirectDecoder, DistributionDecoder
from conprediff_jax.context.weighting import (
    Time,
    Weighting,
    check_choices,
    check_range,
    fixed,
    switch,
)

DECODERS = ("distribution", "direct")
SOURCES = ("features", "prediction")
TARGETS = ("value", "difference", "normalised")
COARSE_TAPS = ("up", "pool", "spread")
BORDERS = ("cut", "masked")
_SHAPES = ("features", "channels", "dimensions")


class ContextLoss(NamedTuple):
    """The results of `ContextPrediction.loss` for every example, float32.

    Attributes:
        weighted: Equation (1).
        distance: The unweighted D, its mean over the points, with one column per stride.
    """

    weighted: Float[Array, "batch"]
    distance: Float[Array, "batch strides"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextPrediction(Weighting):
    """The settings of context prediction, its decoder, and the loss that it adds.

    Attributes:
        strides: The Chebyshev radii of the neighbourhoods.
        stride_weights: w_s. None means 1 / (number of strides) for every stride.
        samples: Q, the number of points that represent one distribution.
        draws: The number of predicted sets of Q points, from noise of their own, whose distances to
            one set of neighbours are averaged. Only the decoder 'distribution' uses it.
        points_per_example: The number of points at which the loss is computed, drawn anew at every
            step; 0 means all points. The expected loss is the same.
        border: What happens where a window is cut off by the border: 'cut' draws from what is left
            of it, if need be the same neighbours several times, and 'masked' leaves out points with
            fewer than Q neighbours. Only the decoder 'distribution' uses it.
        target: What stands for a neighbour: its 'value', its 'difference' to the own point, or its
            value 'normalised' over space, with mean 0 and deviation 1 in every channel of an
            example.
        decoder: 'distribution', or 'direct' for the baseline, which uses no transport distance.
        transport: The transport distance: 'sinkhorn', 'exact', 'sinkhorn_divergence' or 'gaussian';
            see `transport`.
        cost: The cost between two points, a mean over channels: 'squared', or 'smooth_l1', which is
            half the square below 1 and linear above. The transport 'gaussian' knows 'squared'
            alone.
        epsilon: The entropic regularisation relative to the mean cost. Only 'sinkhorn' and
            'sinkhorn_divergence' use it.
        iterations: The number of Sinkhorn iterations. Only 'sinkhorn' and 'sinkhorn_divergence'
            use it.
        weight: lambda. At 0 there is no context prediction. The default is the weight that was
            found best for pixels (docs/results.md).
        source: What the decoder reads: the denoiser's 'features' or its 'prediction' of x_0. The
            caller passes one or the other as h.
        tap: The names of the features that a decoder reads, such as 'output', 'middle' or
            'block_2'; the denoiser says which it has. The losses of several are averaged. The
            caller passes one after the other as h.
        shared_decoder: Whether several taps, which then need the same number of channels, share
            one decoder.
        coarse_tap: What happens where the grid of h is coarser than that of the points: 'up' lets
            the decoder work there, and interpolates its last hidden layer; 'pool' takes the means
            of the points over the cells as points; 'spread' divides the channels of a cell among
            its points.
        hidden: The width of the decoder.
        depth: The number of hidden layers before the output layers.
        kernel: The side of the window of h that the decoder reads at a point, an odd number: 1 for
            the point alone, 3 for a convolution as first layer.
        latent: The number of dimensions of the Gaussian.

    Raises:
        ValueError: A field is out of range; the message names the field.
    """

    strides: tuple[int, ...] = fixed((1, 2, 3))
    stride_weights: tuple[float, ...] | None = None
    samples: int = 8
    draws: int = 1
    points_per_example: int = 0
    border: str = "cut"
    target: str = fixed("value")
    decoder: str = fixed("distribution")
    transport: str = "sinkhorn"
    cost: str = "squared"
    epsilon: float = 0.05
    iterations: int = 20
    weight: float = switch(0.09)
    source: str = fixed("features")
    tap: tuple[str, ...] = fixed(("output",))
    shared_decoder: bool = fixed(False)
    coarse_tap: str = fixed("up")
    hidden: int = fixed(128)
    depth: int = fixed(1)
    kernel: int = fixed(1)
    latent: int = fixed(32)

    def __post_init__(self):
        super().__post_init__()
        check_choices(
            self,
            decoder=DECODERS,
            transport=tuple(transport.TRANSPORTS),
            cost=tuple(transport.COSTS),
            source=SOURCES,
            target=TARGETS,
            coarse_tap=COARSE_TAPS,
            border=BORDERS,
        )
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
        counts = ("samples", "draws", "iterations", "hidden", "depth", "kernel", "latent")
        check_range(self, 1, "must be at least 1", *counts)
        check_range(self, 0, "must not be negative", "points_per_example")
        if self.epsilon <= 0:
            raise ValueError(f"epsilon is {self.epsilon}: it must be positive")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel is {self.kernel}: it must be odd, to have a middle")
        if self.cost != "squared" and self.transport == "gaussian":
            raise ValueError(f"cost is {self.cost!r}: transport 'gaussian' knows 'squared' alone")
        if not self.tap or len(set(self.tap)) < len(self.tap):
            raise ValueError(f"tap is {self.tap}: name one tap or several, each once")

    @property
    def distance(self) -> Callable[..., Float[Array, "..."]]:
        """The transport distance D: a function of two arrays `[..., Q, C]` that returns `[...]`."""
        settings = {} if self.transport == "gaussian" else {"cost": self.cost}
        if self.transport.startswith("sinkhorn"):
            settings |= {"epsilon": self.epsilon, "iterations": self.iterations}
        return functools.partial(transport.TRANSPORTS[self.transport], **settings)

    @functools.partial(jax.jit, static_argnums=0, static_argnames=_SHAPES)
    def init(
        self, rng: Key[Array, ""], *, features: int, channels: int, dimensions: int = 2
    ) -> Any:
        """Returns initial parameters of the decoder, float32.

        Args:
            rng: The key that draws the initial values.
            features: The number of channels of h, as `arranged` returns it.
            channels: The number of channels of x_0.
            dimensions: The number of axes of the grid. Only the parameters of the direct decoder,
                and of one that reads windows, depend on it.
        """
        window = () if self.kernel == 1 else (self.kernel**dimensions,)
        h, time = jnp.zeros((1, 1, *window, features)), jnp.zeros(1)
        if self.decoder == "direct":
            return self._direct(channels, dimensions).init(rng, h, time)["params"]
        noise = jnp.zeros((1, 1, len(self.strides), 1, self.latent))
        return self._distribution(channels).init(rng, h, time, noise)["params"]

    def arranged(
        self, h: Float[Array, "batch *cells features"], x_0: Float[Array, "batch *grid channels"]
    ) -> tuple[Float[Array, "batch *cells2 features2"], Float[Array, "batch *grid2 channels"]]:
        """Returns h and x_0 on one grid where `coarse_tap` is 'pool' or 'spread'.

        Raises:
            ValueError: The grid of h is neither that of x_0, nor one that divides it.
        """
        cells, grid = h.shape[1:-1], x_0.shape[1:-1]
        grids.box(cells, grid)
        if cells == grid or self.coarse_tap == "up":
            return h, x_0
        if self.coarse_tap == "pool":
            return h, grids.pooled(x_0, cells)
        return grids.spread(h, grid), x_0

    @functools.partial(jax.jit, static_argnums=0)
    def loss(
        self,
        params: Any,
        h: Float[Array, "batch *cells features"],
        x_0: Float[Array, "batch *grid channels"],
        t: Time,
        rngs: Key[Array, "batch"],
    ) -> ContextLoss:
        """Computes the context loss (1) from representations and clean points.

        Args:
            params: The parameters of the decoder, from `init`.
            h: The representation of every point, or of every cell of a coarser grid; see
                `coarse_tap`. Gradients flow into it.
            x_0: The clean points on a grid, which has any number of axes, at a scale of about 1:
                pixels in [-1, 1], latents or codes of deviation 1. The loss grows with the square
                of the scale, and `weight` is meant for this one. No gradient flows into them.
            t: Diffusion times, which `share` and `alpha_bar` read.
            rngs: One key for every example, so that the draws do not depend on how a batch is
                split.

        Returns:
            The losses of every example. The mean of `weighted` over the batch is the term to add to
            the training loss.

        Raises:
            ValueError: The grid of h does not fit that of x_0, the grid has a single point, or
                `border` leaves out all points.
        """
        h, x_0 = self.arranged(h, jax.lax.stop_gradient(x_0.astype(jnp.float32)))
        cells, grid = h.shape[1:-1], x_0.shape[1:-1]
        if self.target == "normalised":
            x_0 = jax.nn.standardize(x_0, axis=tuple(range(1, x_0.ndim - 1)))
        num_points = int(np.prod(grid))
        h = h.reshape(len(h), int(np.prod(cells)), -1)
        x_0 = x_0.reshape(len(h), num_points, -1)
        keys = jax.vmap(lambda rng: jax.random.split(rng, 3))(rngs)
        if 0 < self.points_per_example < num_points:
            points = neighborhood.draw_points(keys[:, 0], num_points, self.points_per_example)
        else:
            points = jnp.broadcast_to(jnp.arange(num_points), (len(h), num_points))
        read = self._reader(params, h, self.share(t), points, cells, grid)
        if self.decoder == "direct":
            distance = self._direct_distance(read, x_0, points, grid)
        else:
            distance = self._transport_distance(read, x_0, points, grid, keys[:, 1:])
        weights = self.stride_weights or (1 / len(self.strides),) * len(self.strides)
        return ContextLoss(self.time_weight(t) * (distance @ jnp.asarray(weights)), distance)

    def _distribution(self, channels: int) -> nn.Module:
        return DistributionDecoder(channels, len(self.strides), self.hidden, self.depth, self.dtype)

    def _direct(self, channels: int, dimensions: int) -> nn.Module:
        neighbors = tuple((2 * s + 1) ** dimensions - 1 for s in self.strides)
        return DirectDecoder(channels, neighbors, self.hidden, self.depth, self.dtype)

    def _reader(self, params, h, time, points, cells, grid) -> Callable[..., Any]:
        """Returns a function from a decoder, and the noise it may need, to its answer at points."""
        given, at = {}, points
        if cells != grid:  # the decoder answers for all cells, and the answer is brought up
            at = jnp.broadcast_to(jnp.arange(h.shape[1]), h.shape[:2])
            brought_up = functools.partial(grids.bring_up, points=points, cells=cells, grid=grid)
            given["bring_up"] = brought_up
        if self.kernel > 1:
            h = grids.windows(h, at, grid=cells, side=self.kernel)
        elif at.shape[1] < h.shape[1]:
            h = neighborhood.gather_points(h, at)
        return lambda decoder, *noise: decoder.apply({"params": params}, h, time, *noise, **given)

    def _transport_distance(self, read, x_0, points, grid, keys):
        """Returns the mean transport distance for each stride, `[batch, strides]`."""
        count = self.draws * self.samples
        shape = (points.shape[1], len(self.strides), count, self.latent)
        noise = jax.vmap(lambda rng: jax.random.normal(rng, shape, self.dtype))(keys[:, 0])
        predicted = read(self._distribution(x_0.shape[-1]), noise)
        neighbors = neighborhood.draw_neighbors(
            keys[:, 1], points, grid=grid, strides=self.strides, samples=self.samples
        )
        target = neighborhood.gather_points(x_0, neighbors)
        if self.target == "difference":
            target -= neighborhood.gather_points(x_0, points)[:, :, None, None]
        if self.draws > 1:
            split = (*predicted.shape[:3], self.draws, self.samples, predicted.shape[-1])
            predicted = predicted.reshape(split)
            target = jnp.broadcast_to(target[:, :, :, None], split)
        distance = self.distance(predicted, target)
        if self.draws > 1:
            distance = distance.mean(-1)
        if self.border == "cut":
            return distance.mean(1)
        counted = self._has_enough_neighbors(points, grid)
        return (distance * counted).sum(1) / jnp.maximum(counted.sum(1), 1)

    def _has_enough_neighbors(self, points, grid) -> Bool[Array, "batch points strides"]:
        """Returns whether points have at least Q neighbours at every stride."""
        enough = [neighborhood.neighbor_counts(grid, s) >= self.samples for s in self.strides]
        for stride, places in zip(self.strides, enough, strict=True):
            if not places.any():
                raise ValueError(
                    f"border is 'masked': no point of a grid of {grid} has samples="
                    f"{self.samples} neighbours at stride {stride}"
                )
        return jnp.stack([jnp.asarray(places.reshape(-1))[points] for places in enough], -1)

    def _direct_distance(self, read, x_0, points, grid):
        """Returns the mean cost over true neighbours, `[batch, strides]`."""
        columns = []
        for stride, predicted in zip(
            self.strides, read(self._direct(x_0.shape[-1], len(grid))), strict=True
        ):
            indices, valid = neighborhood.ordered_neighbors(points, grid=grid, stride=stride)
            target = neighborhood.gather_points(x_0, indices)
            if self.target == "difference":
                target -= neighborhood.gather_points(x_0, points)[:, :, None]
            error = transport.COSTS[self.cost](predicted - target).mean(-1)
            columns.append(jnp.mean(error, axis=(1, 2), where=valid))
        return jnp.stack(columns, axis=-1)
