"""The contract that denoisers of all architectures keep."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int, Real, Shaped

from conprediff_jax.common.registry import Registry


class Denoised(NamedTuple):
    """The result of a denoiser.

    Attributes:
        output: The prediction (noise, clean points, v or logits), `[batch, *grid, out]`, float32.
        features: The representation of every point, usually the last feature map before the output
            projection, `[batch, *grid, channels]`, in the denoiser's activation dtype. The context
            decoder reads it.
    """

    output: Array
    features: Array


@runtime_checkable
class Denoiser(Protocol):
    """A Flax module that makes the prediction that a process needs.

    Its fields are the keys of the `model` section of a config. Fields that other sections decide
    are marked by `common.keys.derived`. The code that builds a model fills them in by their names:
    `out_channels`, `num_codes`, `grid`, `num_steps`, `text_dim`, `learned_null` and `dtype`.

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


DENOISERS: Registry[type] = Registry("denoiser")
