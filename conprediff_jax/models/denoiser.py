"""The contract that denoisers of all architectures keep."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from flax.core import FrozenDict
from jaxtyping import Array, Bool, Float, Int, Real, Shaped

from conprediff_jax.common.errors import FieldError
from conprediff_jax.common.names import did_you_mean
from conprediff_jax.common.registry import Registry

OUTPUT = "output"  # the name of the tap that every denoiser has


class Denoised(NamedTuple):
    """The result of a denoiser.

    Attributes:
        output: The prediction (noise, clean points, v or logits), `[batch, *grid, out]`, float32.
        features: The representation of every point, usually the last feature map before the output
            projection, `[batch, *grid, channels]`, in the denoiser's activation dtype. This is the
            tap 'output'.
        taps: The features inside the network that were asked for, by the names in
            `Denoiser.tap_names`, `[batch, *grid, channels]`. Their grids may be coarser than that
            of the points.
    """

    output: Array
    features: Array
    taps: Mapping[str, Array] = FrozenDict()

    def tap(self, name: str) -> Array:
        """The features of a tap: `features` for 'output', or one of `taps`."""
        return self.features if name == OUTPUT else self.taps[name]


@runtime_checkable
class Denoiser(Protocol):
    """A Flax module that makes the prediction that a process needs.

    Its fields are the keys of the `model` section of a config. Fields that other sections decide
    are marked by `common.keys.derived`. The code that builds a model fills them in by their names:
    `out_channels`, `num_codes`, `grid`, `num_steps`, `text_dim`, `learned_null` and `dtype`.

    A denoiser whose features can be read inside the network, too, has the property `tap_names`, a
    tuple of their names in the order of computation, the last of which is 'output'. Its `__call__`
    takes `taps`, the names of those to return. Features that are not asked for leave no trace in
    the program. A denoiser without `tap_names` has the tap 'output' alone.

    Attributes:
        num_classes: The number of classes; None for a model without labels.
        learned_null: Whether the model learns a null label or null text for a condition that is
            left out.
        discrete: Whether the model reads tokens.
    """

    num_classes: int | None
    learned_null: bool
    discrete: bool

    @property
    def downsampling(self) -> int | None:
        """The number that must divide both sides of a grid; None for a model of one grid only."""
        ...

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """See `flax.linen.Module`."""
        ...

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """See `flax.linen.Module`."""
        ...

    def __call__(
        self,
        x: Shaped[Array, "batch *point"],
        t: Real[Array, "batch"],
        *,
        label: Int[Array, "batch"] | None = None,
        text: Float[Array, "batch text_length text_dim"] | None = None,
        unconditional: Bool[Array, "batch"] | None = None,
        train: bool = False,
    ) -> Denoised:
        """Denoises a batch.

        Args:
            x: Noisy points.
            t: Diffusion times, as `Process.network_time` returns them.
            label: The classes, if and only if the model has `num_classes`.
            text: The encoded captions, if and only if the model reads text.
            unconditional: True for examples to denoise without their condition; needs
                `learned_null`.
            train: Whether dropout is active. It draws from the stream "dropout".
        """
        ...


def tap_names(denoiser: Denoiser) -> tuple[str, ...]:
    """The names of the features that a denoiser can return, in the order of computation."""
    return getattr(denoiser, "tap_names", (OUTPUT,))


def check_taps(denoiser: Denoiser, taps: Sequence[str]) -> None:
    """Checks the names of taps.

    Args:
        denoiser: The denoiser whose features are to be read.
        taps: The names.

    Raises:
        FieldError: The denoiser has no tap of such a name; the message lists those that it has.
    """
    known = tap_names(denoiser)
    for name in taps:
        if name not in known:
            hint = did_you_mean(name, known)
            raise FieldError("tap", f"is {name!r}: {hint}the denoiser has {', '.join(known)}")


DENOISERS: Registry[type] = Registry("denoiser")
