"""The diffusion transformer, DiT, on patches of a grid of points, such as latents or pixels.

Every patch of p x p points becomes a token, to which a position embedding is added. Then come these
blocks:

    x + g1 * attention(m(x, s1, b1)),   [x + cross_attention(x, text)],   x + g2 * MLP(m(x, s2, b2))
    m(x, s, b) = LN(x) (1 + s) + b                                                           (1)
    [b1, s1, g1, b2, s2, g2] = W silu(c),     c = embedding(t) + embedding(label)            (2)
    embedding(t) = W_out silu(W_in [cos(t w_0), ..., sin(t w_0), ...])                       (3)

Last come m(x, s, b) and a projection of every token to the p x p points of its patch. All W of (2),
this projection and the output of cross-attention start at zero ("adaLN-zero"). So initially every
block is the identity, the prediction is 0, and a text has no effect. Norms have no parameters, and
position embeddings are fixed (`patches`).

The blocks are a stack, see `blocks`, and so are their parameters. The tokens after every block can
be tapped under the names `block_1` .. `block_{num_layers}`, on the grid of the patches.

    input   time_embedding_{in,out}   label_embedding   text_embedding_{in,out}   null_text
    blocks/{modulation, {self,cross}_attention/{query,key,value,out}, feed_forward/{in,out}}
    output_modulation   output

SiT is the same network, trained by flow matching. `SIZES` lists the published sizes. With four
channels of latents and four of a learned variance, and with 1000 classes and a null, they have
these numbers of parameters:

    patch          S              B              L             XL
      2       32,865,056    130,315,808    457,840,672    674,834,720
      4       32,920,448    130,426,496    457,988,224    675,000,704
      8       33,142,016    130,869,248    458,578,432    675,664,640

The published count of XL/2, 675,129,632, includes the fixed table of 256 positions. Without the
variance there are 4 patch^2 (width + 1) fewer.

Sources: Peebles and Xie 2022 (arXiv 2212.09748) and its published code; Ma et al. 2024 (SiT, arXiv
2401.08740). Cross-attention stands where Chen et al. 2023 have it (PixArt-alpha, arXiv 2310.00426).
"""

import functools
import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Real

from conprediff_jax.common import linear
from conprediff_jax.common.blocks import BLOCKS
from conprediff_jax.common.keys import adjustable, derived
from conprediff_jax.models import blocks, layers, patches
from conprediff_jax.models.attention import attend, check_kind
from conprediff_jax.models.denoiser import DENOISERS, OUTPUT, Denoised

Tokens = Float[Array, "batch tokens features"]
Embedding = Float[Array, "batch features"]
Text = Float[Array, "batch text_length features"]

# The published sizes, as keys of a `model` section.
SIZES: Mapping[str, Mapping[str, int]] = {
    "S": {"width": 384, "num_layers": 12, "num_heads": 6},
    "B": {"width": 768, "num_layers": 12, "num_heads": 12},
    "L": {"width": 1024, "num_layers": 24, "num_heads": 16},
    "XL": {"width": 1152, "num_layers": 28, "num_heads": 16},
}

TIME_FREQUENCIES = 128
_LONGEST_PERIOD = 10_000.0
_EPSILON = 1e-6

_ZEROS = nn.initializers.zeros
_NORMAL = nn.initializers.normal(0.02)  # for embeddings of times, labels and texts
_XAVIER = nn.initializers.xavier_uniform()
# In the published code query, key and value are one matrix with 3 width outputs. So they are drawn
# uniformly up to sqrt(6 / (width + 3 width)).
_XAVIER_OF_THREE = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")


def time_waves(t: Real[Array, "batch"], *, endpoint: bool = False) -> Float[Array, "batch waves"]:
    """Returns the cosines and sines of equation (3), in float32.

    Args:
        t: Times.
        endpoint: Whether the lowest of the n = 128 frequencies is exactly 1/10000, so that they are
            10000^(-k / (n - 1)). Otherwise they are 10000^(-k / n).
    """
    number = jnp.arange(TIME_FREQUENCIES, dtype=jnp.float32)
    exponents = -math.log(_LONGEST_PERIOD) * number / (TIME_FREQUENCIES - endpoint)
    frequencies = jnp.exp(exponents)  # rounded as in published models
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def modulated(x: Tokens, scale: Embedding, shift: Embedding, epsilon: float = _EPSILON) -> Tokens:
    """Returns m(x, s, b) of equation (1), computed in float32."""
    norm = jax.nn.standardize(x.astype(jnp.float32), epsilon=epsilon)
    return (norm * (1 + scale[:, None]) + shift[:, None]).astype(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention, initialised as in the published code.

    Attributes:
        heads: The number of heads.
        dtype: The dtype of the activations; the softmax is float32.
        kind: The kernel to use, see `attention.attend`.
    """

    heads: int
    dtype: DTypeLike = jnp.float32
    kind: str = "auto"

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        """Attends from every token to all tokens."""
        dense = functools.partial(linear.Dense, x.shape[-1], dtype=self.dtype)
        by_head = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        query, key, value = (
            dense(kernel_init=_XAVIER_OF_THREE, name=name)(x).reshape(by_head)
            for name in ("query", "key", "value")
        )
        attended = attend(query, key, value, self.kind)
        return dense(kernel_init=_XAVIER, name="out")(attended.reshape(x.shape))


class FeedForward(nn.Module):
    """W_out gelu(W_in x), with GELU approximated by tanh and hidden layers 4 times as wide as x.

    Attributes:
        dtype: The dtype of the activations.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        """Maps every token to a token, independently of the others."""
        dense = functools.partial(linear.Dense, dtype=self.dtype, kernel_init=_XAVIER)
        hidden = dense(4 * x.shape[-1], name="in")(x)
        return dense(x.shape[-1], name="out")(nn.gelu(hidden, approximate=True))


class DiTBlock(nn.Module):
    """One block of the transformer, equations (1) and (2).

    Attributes:
        num_heads: The number of heads of both attentions.
        mlp_norm_epsilon: The epsilon of the norm before the feed-forward layer.
        dtype: The dtype of the activations.
        attention: The kernel of attention, see `attention.attend`.
    """

    num_heads: int
    mlp_norm_epsilon: float = _EPSILON
    dtype: DTypeLike = jnp.float32
    attention: str = "auto"

    @nn.compact
    def __call__(self, x: Tokens, c: Embedding, text: Text | None) -> Tokens:
        """Maps tokens to tokens, given silu(c) and a text of the model's width, or None."""
        modulation = _modulation(6, c, self.dtype, "modulation")
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        attention = SelfAttention(self.num_heads, self.dtype, self.attention, name="self_attention")
        x = x + gate[:, None] * attention(modulated(x, scale, shift))
        if text is not None:
            cross = functools.partial(layers.Attention, zero_init=True, kernel_init=_XAVIER)
            attention = cross(
                self.num_heads, dtype=self.dtype, kind=self.attention, name="cross_attention"
            )
            x = x + attention(x, text)
        h = modulated(x, mlp_scale, mlp_shift, self.mlp_norm_epsilon)
        return x + mlp_gate[:, None] * FeedForward(self.dtype, name="feed_forward")(h)


@DENOISERS.register("dit")
class DiT(nn.Module):
    """Predicts what the process needs from noisy points.

    The features are a representation of every point. A token stands for the p x p points of its
    patch, and each of these points gets width / p^2 of the channels of the token, in the same order
    as in the prediction. So the points of a patch have different representations, the grid of
    features is that of the points, and this needs no further parameters.

    Attributes:
        out_channels: The number of channels of the prediction.
        patch: p, the side of a patch in points. p^2 must divide `width`.
        width: The number of channels of a token, a multiple of 4 and of `num_heads`.
        num_layers: The number of blocks.
        num_heads: The number of attention heads.
        num_classes: The number of classes; None for a model without labels.
        learned_null: Whether the model learns a null label or null text for a condition that is
            left out, as classifier-free guidance needs it.
        text_dim: The number of channels of text tokens; None for a model without text.
        time_scale: The time embedding reads `time_scale * t + time_shift`. DiT reads steps 0 .. T-1
            unchanged. SiT, whose clean points are at time 1, reads 1 - t for our t in [0, 1].
        time_shift: See `time_scale`.
        time_endpoint: See `time_waves`. False in the published code and True in diffusers.
        mlp_norm_epsilon: The epsilon of the norm before the feed-forward layers, 1e-6 in the
            published code and 1e-5 in diffusers. All other norms have 1e-6.
        dtype: The dtype of the activations. Parameters and the output are float32.
        attention: The kernel of attention: 'auto' for the one that suits the devices, 'xla',
            'cudnn' or 'flash'; see `attention.attend`.
        remat: Whether blocks are recomputed in the backward pass.
        remat_policy: What is not recomputed but kept, besides the input of a block. A key of
            `blocks.REMAT_POLICIES`: 'nothing', or the 'products' of its layers.
        unroll: Whether the program has the blocks one after another instead of a loop. It takes
            longer to compile.

    Raises:
        ValueError: An option is out of range; the constructor raises it.
    """

    out_channels: int = derived()
    patch: int = 2
    width: int = SIZES["B"]["width"]
    num_layers: int = SIZES["B"]["num_layers"]
    num_heads: int = SIZES["B"]["num_heads"]
    num_classes: int | None = None
    learned_null: bool = derived(False)
    text_dim: int | None = derived(None)
    time_scale: float = 1.0
    time_shift: float = 0.0
    time_endpoint: bool = False
    mlp_norm_epsilon: float = _EPSILON
    dtype: DTypeLike = derived(jnp.float32)
    attention: str = adjustable("auto")
    remat: bool = adjustable(False)
    remat_policy: str = adjustable("nothing")
    unroll: bool = adjustable(False)

    discrete = False

    def __post_init__(self):
        _validate(self)
        super().__post_init__()

    @property
    def tap_names(self) -> tuple[str, ...]:
        """The names of the features that can be tapped, in the order of computation."""
        return (*blocks.tap_names(self.num_layers), OUTPUT)

    @property
    def downsampling(self) -> int:
        """The patch, which must divide both sides of a grid. Position embeddings fit any grid."""
        return self.patch

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width in_channels"],
        t: Real[Array, "batch"],
        *,
        label: Int[Array, "batch"] | None = None,
        text: Float[Array, "batch text_length text_dim"] | None = None,
        unconditional: Bool[Array, "batch"] | None = None,
        train: bool = False,
        taps: Sequence[str] = (),
    ) -> Denoised:
        """Denoises a batch.

        Args:
            x: Noisy points. Height and width are multiples of `patch`.
            t: Diffusion times, integer or fractional.
            label: The classes, if and only if the model has `num_classes`.
            text: The text tokens, if and only if the model has `text_dim`.
            unconditional: True for examples to denoise without label and text. It needs
                `learned_null`.
            train: Not used, since this model has no dropout.
            taps: The features to return as well, by their `tap_names`.

        Returns:
            The output, `[batch, height, width, out_channels]` in float32, the features, `[batch,
            height, width, width of the model / patch^2]` in `dtype`, and the tapped ones, `[batch,
            height / patch, width / patch, width of the model]`.

        Raises:
            ValueError: The shape of `x`, or the presence of `label` or `text`, does not fit.
        """
        del train
        self._check_shape(x)
        rows, columns = (side // self.patch for side in x.shape[1:3])
        label, text = layers.condition(self, label, text, unconditional)
        c = self._embed_condition(t, label)
        inner = [name for name in taps if name != OUTPUT]
        h, named = blocks.run(
            DiTBlock(
                self.num_heads, self.mlp_norm_epsilon, self.dtype, self.attention, name=BLOCKS
            ),
            self._embed_points(x),
            c,
            self._embed_text(text),
            count=self.num_layers,
            taps=inner,
            unroll=self.unroll,
            remat=self.remat,
            policy=self.remat_policy,
        )

        shift, scale = _modulation(2, c, self.dtype, "output_modulation")
        h = modulated(h, scale, shift)
        # This is float32, since predictions need more than the three digits of bfloat16.
        project = linear.Dense(self.patch**2 * self.out_channels, kernel_init=_ZEROS, name="output")
        output = patches.points_of(project(h), rows, columns, self.patch)
        features = patches.points_of(h, rows, columns, self.patch)
        named = {name: h.reshape(len(h), rows, columns, self.width) for name, h in named.items()}
        named[OUTPUT] = features
        return Denoised(output, features, {name: named[name] for name in taps})

    def _embed_points(self, x: Float[Array, "batch height width channels"]) -> Tokens:
        """Returns the tokens of the patches with their position embeddings."""
        rows, columns = (side // self.patch for side in x.shape[1:3])
        dense = linear.Dense(self.width, dtype=self.dtype, kernel_init=_XAVIER, name="input")
        places = patches.positions(rows, columns, self.width).reshape(rows * columns, self.width)
        return dense(patches.patches_of(x, self.patch)) + places.astype(self.dtype)

    def _embed_condition(
        self, t: Real[Array, "batch"], label: Int[Array, "batch"] | None
    ) -> Embedding:
        """Returns silu(c) of equations (2) and (3), which every block reads."""
        dense = functools.partial(linear.Dense, self.width, dtype=self.dtype, kernel_init=_NORMAL)
        scaled = self.time_scale * t.astype(jnp.float32) + self.time_shift
        c = time_waves(scaled, endpoint=self.time_endpoint)
        c = dense(name="time_embedding_out")(nn.silu(dense(name="time_embedding_in")(c)))
        if label is not None:
            labels = self.num_classes + self.learned_null
            embed = functools.partial(linear.Embed, embedding_init=_NORMAL, dtype=self.dtype)
            c = c + embed(labels, self.width, name="label_embedding")(label)
        return nn.silu(c)

    def _embed_text(self, text: Float[Array, "batch text_length text_dim"] | None) -> Text | None:
        """Returns the text tokens at the model's width, as cross-attention reads them."""
        if text is None:
            return None
        dense = functools.partial(linear.Dense, self.width, dtype=self.dtype, kernel_init=_NORMAL)
        hidden = nn.gelu(dense(name="text_embedding_in")(text), approximate=True)
        return dense(name="text_embedding_out")(hidden)

    def _check_shape(self, x: Array) -> None:
        """Raises ValueError if the shape of the input does not fit the options."""
        height, width = x.shape[1:3]
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"grid of {height} x {width} points: both must be multiples of patch={self.patch}"
            )


def _modulation(parts: int, c: Embedding, dtype: DTypeLike, name: str) -> list[Embedding]:
    """Returns `parts` scales, shifts or gates of equation (2), all of them initially 0."""
    width = c.shape[-1]
    dense = linear.Dense(parts * width, dtype=dtype, kernel_init=_ZEROS, name=name)
    return jnp.split(dense(c), parts, axis=-1)


def _validate(model: DiT) -> None:
    """Raises ValueError if an option of the model is out of range."""
    for option in ("out_channels", "patch", "width", "num_layers", "num_heads"):
        if getattr(model, option) < 1:
            raise ValueError(f"{option}={getattr(model, option)} must be at least 1")
    for option in ("num_classes", "text_dim"):
        value = getattr(model, option)
        if value is not None and value < 1:
            raise ValueError(f"{option}={value} must be None or at least 1")
    for divisor, why in (
        (4, "as position embeddings need"),
        (model.num_heads, "num_heads"),
        (model.patch**2, f"the points of a patch, as patch={model.patch}"),
    ):
        if model.width % divisor:
            raise ValueError(f"width={model.width} must be a multiple of {divisor}, {why}")
    check_kind(model.attention)
    blocks.check_policy(model.remat_policy)
