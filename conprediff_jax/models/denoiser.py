"""What every denoiser is, whatever its architecture."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int, Real, Shaped

from conprediff_jax.common.registry import Registry


class Denoised(NamedTuple):
    """What every denoiser returns.

    Attributes:
        output: The prediction (noise, clean image, v, or logits), `[batch, *grid, out]`, float32.
        features: The last feature map, just before the output projection, `[batch, *grid,
            channels]`, in the denoiser's activation dtype. The context head reads it.
    """

    output: Array
    features: Array


@runtime_checkable
class Denoiser(Protocol):
    """A Flax module that predicts what a process asks for; its fields are the `model` section.

    Fields that other sections decide are marked by `common.keys.derived`. The builder fills them
    in by name, from `out_channels`, `num_codes`, `grid`, `num_steps`, `text_dim`, `learned_null`
    and `dtype`.

    Attributes:
        num_classes: Classes of labels; None for a model without labels.
        learned_null: Whether the model has learned stand-ins for a condition that is left out.
        discrete: Whether it reads tokens.
    """

    num_classes: int | None
    learned_null: bool
    discrete: bool

    @property
    def downsampling(self) -> int | None:
        """What the sides of a grid must be multiples of; None where one grid alone is read."""
        ...

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """Flax's own."""
        ...

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Flax's own."""
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
            t: Diffusion times 0 .. T-1.
            label: Classes, if and only if the model has `num_classes`.
            text: Encoded captions, if and only if the model reads text.
            unconditional: Examples to be denoised without their condition; needs `learned_null`.
            train: Whether dropout is active, drawn from the stream "dropout".
        """
        ...


DENOISERS: Registry[type] = Registry("denoiser")
