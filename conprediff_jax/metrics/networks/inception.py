"""The Inception network of 2015 whose features define the FID, as in pytorch-fid.

Source: Szegedy et al. 2015 (arXiv 1512.00567), in the version of TensorFlow's
`inception-2015-12-05`. It differs from the later version (torchvision's) in four ways: average
pools leave the padding out of the mean; the last block pools by the maximum; there are 1008
classes; there is no auxiliary head. Normalisation uses stored statistics, with epsilon 0.001.

Images are scaled as pytorch-fid scales them,

    x = 2 resize(image / 255, 299 x 299, bilinear, no antialiasing, half-pixel centres) - 1     (1)

torch-fidelity and TensorFlow's graph use (image - 128) / 128 and other centres, which changes the
features by some thousandths.

Modules and parameters have the names of pytorch-fid's weight file.
"""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from conprediff_jax.weights import tensors

SIZE = 299
CLASSES = 1008
SPATIAL_CHANNELS = 7

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


class InceptionFeatures(NamedTuple):
    """The features that metrics use; float32.

    Attributes:
        pool: Mean over places of the last block, for FID, KID, precision and recall.
        spatial: First seven channels of Mixed_6d's 1x1 branch after its ReLU, at 17 x 17 places,
            for the sFID (Nash et al. 2021, arXiv 2103.03841; TensorFlow's `mixed_6/conv`, as in
            ADM).
        logits: Logits of the 1008 classes, without the bias, for the inception score.
        taps: Means over places of 64, 192 and 768 channels: after the first and the second
            max-pool, and at the place of the auxiliary head.
    """

    pool: Float[Array, "batch 2048"]
    spatial: Float[Array, "batch 2023"]
    logits: Float[Array, "batch 1008"]
    taps: tuple[Float[Array, "batch 64"], Float[Array, "batch 192"], Float[Array, "batch 768"]]


class _Conv(nn.Module):
    """A convolution, normalisation by stored statistics, and a ReLU."""

    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Conv(
            self.channels,
            self.kernel,
            self.stride,
            padding="SAME" if self.padded else "VALID",
            use_bias=False,
            precision="highest",
            name="conv",
        )(x)
        return nn.relu(_Norm(name="bn")(x))


class _Norm(nn.Module):
    """Batch normalisation with stored statistics: an affine map of each channel."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.param("mean", nn.initializers.zeros, shape)
        var = self.param("var", nn.initializers.ones, shape)
        return (x - mean) * (scale * jax.lax.rsqrt(var + 1e-3)) + bias


class _Block(nn.Module):
    """Parallel branches of convolutions, whose outputs are concatenated."""

    def chain(self, x: Array, prefix: str, *convolutions: tuple) -> Array:
        """Convolutions in sequence, called `prefix` if there is one, else `prefix`_1, _2, ..."""
        for number, (channels, kernel) in enumerate(convolutions, 1):
            name = prefix if len(convolutions) == 1 else f"{prefix}_{number}"
            x = _Conv(channels, kernel, name=name)(x)
        return x

    def average(self, x: Array) -> Array:
        """The mean over 3x3 places; places of the padding do not count."""
        return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


class _A(_Block):
    """35 x 35 places."""

    pool: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        one, three, five = (1, 1), (3, 3), (5, 5)
        parts = [
            self.chain(x, "branch1x1", (64, one)),
            self.chain(x, "branch5x5", (48, one), (64, five)),
            self.chain(x, "branch3x3dbl", (64, one), (96, three), (96, three)),
            self.chain(self.average(x), "branch_pool", (self.pool, one)),
        ]
        return jnp.concatenate(parts, axis=-1)


class _B(_Block):
    """35 x 35 -> 17 x 17 places."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        three = (3, 3)
        deep = _Conv(64, name="branch3x3dbl_1")(x)
        deep = _Conv(96, three, name="branch3x3dbl_2")(deep)
        parts = [
            _Conv(384, three, 2, padded=False, name="branch3x3")(x),
            _Conv(96, three, 2, padded=False, name="branch3x3dbl_3")(deep),
            nn.max_pool(x, three, (2, 2)),
        ]
        return jnp.concatenate(parts, axis=-1)


class _C(_Block):
    """17 x 17 places, convolutions along rows and columns; also gives its first branch."""

    middle: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        c, one, row, column = self.middle, (1, 1), (1, 7), (7, 1)
        parts = [
            self.chain(x, "branch1x1", (192, one)),
            self.chain(x, "branch7x7", (c, one), (c, row), (192, column)),
            self.chain(x, "branch7x7dbl", (c, one), (c, column), (c, row), (c, column), (192, row)),
            self.chain(self.average(x), "branch_pool", (192, one)),
        ]
        return jnp.concatenate(parts, axis=-1), parts[0]


class _D(_Block):
    """17 x 17 -> 8 x 8 places."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        three, row, column = (3, 3), (1, 7), (7, 1)
        short = _Conv(192, name="branch3x3_1")(x)
        long = _Conv(192, name="branch7x7x3_1")(x)
        long = _Conv(192, row, name="branch7x7x3_2")(long)
        long = _Conv(192, column, name="branch7x7x3_3")(long)
        parts = [
            _Conv(320, three, 2, padded=False, name="branch3x3_2")(short),
            _Conv(192, three, 2, padded=False, name="branch7x7x3_4")(long),
            nn.max_pool(x, three, (2, 2)),
        ]
        return jnp.concatenate(parts, axis=-1)


class _E(_Block):
    """8 x 8 places."""

    max_pool: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        row, column = (1, 3), (3, 1)
        short = _Conv(384, name="branch3x3_1")(x)
        long = self.chain(x, "branch3x3dbl", (448, (1, 1)), (384, (3, 3)))
        pooled = nn.max_pool(x, (3, 3), (1, 1), "SAME") if self.max_pool else self.average(x)
        parts = [
            _Conv(320, name="branch1x1")(x),
            _Conv(384, row, name="branch3x3_2a")(short),
            _Conv(384, column, name="branch3x3_2b")(short),
            _Conv(384, row, name="branch3x3dbl_3a")(long),
            _Conv(384, column, name="branch3x3dbl_3b")(long),
            _Conv(192, name="branch_pool")(pooled),
        ]
        return jnp.concatenate(parts, axis=-1)


class Inception(nn.Module):
    """The whole network, from images to features."""

    @nn.compact
    def __call__(self, images: UInt8[Array, "batch height width 3"]) -> InceptionFeatures:
        """The features of images of any size."""
        x = images.astype(jnp.float32) / 255
        shape = (len(x), SIZE, SIZE, 3)
        x = 2 * jax.image.resize(x, shape, "bilinear", antialias=False) - 1  # (1)

        x = _Conv(32, (3, 3), 2, padded=False, name="Conv2d_1a_3x3")(x)
        x = _Conv(32, (3, 3), padded=False, name="Conv2d_2a_3x3")(x)
        x = _Conv(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        taps = [x.mean(axis=(1, 2))]
        x = _Conv(80, padded=False, name="Conv2d_3b_1x1")(x)
        x = _Conv(192, (3, 3), padded=False, name="Conv2d_4a_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        taps.append(x.mean(axis=(1, 2)))
        for letter, pool in zip("bcd", (32, 64, 64), strict=True):
            x = _A(pool, name=f"Mixed_5{letter}")(x)
        x = _B(name="Mixed_6a")(x)
        branch = {}
        for letter, middle in zip("bcde", (128, 160, 160, 192), strict=True):
            x, branch[letter] = _C(middle, name=f"Mixed_6{letter}")(x)
        taps.append(x.mean(axis=(1, 2)))
        spatial = branch["d"][..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        x = _D(name="Mixed_7a")(x)
        x = _E(max_pool=False, name="Mixed_7b")(x)
        x = _E(max_pool=True, name="Mixed_7c")(x)
        pool = x.mean(axis=(1, 2))

        logits = nn.Dense(CLASSES, use_bias=False, precision="highest", name="fc")(pool)
        return InceptionFeatures(pool, spatial, logits, tuple(taps))


def params_from_pytorch_fid(state_dict: Mapping[str, np.ndarray]) -> dict:
    """The parameters from the weight file of pytorch-fid or torch-fidelity.

    Args:
        state_dict: NumPy arrays by their names in the file. Counters of batches are not read, nor
            is the last bias, which the logits of the inception score leave out.

    Raises:
        ValueError: A tensor is missing or left over, or has another shape than the network's.
    """
    unread = ("num_batches_tracked", "fc.bias")
    return _table().read({k: v for k, v in state_dict.items() if not k.endswith(unread)})


def _table() -> tensors.Table:
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.uint8)
    params = jax.eval_shape(Inception().init, jax.random.key(0), image)["params"]
    shapes = tensors.parameter_shapes(params)
    names = {path: ".".join([*path[:-1], _LEAVES.get(path[-1], path[-1])]) for path in shapes}
    return tensors.Table(model="2015 Inception", shapes=shapes, names=names)
