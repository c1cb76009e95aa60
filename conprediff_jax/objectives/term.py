"""The contract of a term of the training loss."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Key, Shaped

from conprediff_jax.common.registry import Registry
from conprediff_jax.context.weighting import Time, Weighting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """What a term sees of a batch. `Term.init_params` gets one with shapes in place of arrays.

    Attributes:
        taps: The features that the term's `taps` name, `[batch, *cells, channels]`.
        points: The vectors of the clean points, `[batch, *grid, channels]`.
        x_t: The noisy points as the process has them.
        t: The diffusion times.
        rngs: One key for every example.
        estimate: A function that returns the vectors of the denoiser's estimate of the clean
            points, in the shape of `points`.
        denoising_loss: A function that returns the denoising loss of every example if the denoiser
            reads other points than `x_t`. It costs a pass through the denoiser.
        encoded: The features of a frozen encoder, `[batch, *cells, channels]`; None if the data
            have none.
    """

    taps: Mapping[str, Any]
    points: Any
    x_t: Any
    t: Time | Any
    rngs: Key[Array, "batch"] | None = None
    estimate: Callable[[], Any] | None = None
    denoising_loss: Callable[[Shaped[Array, "batch *point"]], Float[Array, "batch"]] | None = None
    encoded: Any = None


class Evaluated(NamedTuple):
    """The value of a term.

    Attributes:
        weighted: The loss of every example times `Weighting.time_weight`, float32.
        metrics: What the log shows besides the loss, scalars by name.
    """

    weighted: Float[Array, "batch"]
    metrics: dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term(Weighting):
    """A term of the training loss. Its fields are the keys of its section of a config."""

    reads_encoded = False  # whether the term needs `Seen.encoded`

    @property
    def taps(self) -> tuple[str, ...]:
        """The names of the features that the term reads, see `models.denoiser.Denoised`."""
        raise NotImplementedError

    def init_params(self, rng: Key[Array, ""], shapes: Seen) -> Any:
        """Returns initial parameters, float32; an empty dict for a term that has none.

        Args:
            rng: The key that draws the initial values.
            shapes: Shapes and dtypes of what the term will see.
        """
        raise NotImplementedError

    def evaluate(self, params: Any, seen: Seen) -> Evaluated:
        """Returns the value of the term on a batch."""
        raise NotImplementedError

    def mean_distance(self, distance: Float[Array, "batch"], seen: Seen) -> Evaluated:
        """The value of a term with one distance for every example."""
        weighted = self.time_weight(seen.t) * distance
        return Evaluated(weighted, {"distance": distance.mean()})


TERMS: Registry[type[Term]] = Registry("term")
