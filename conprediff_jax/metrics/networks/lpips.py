"""LPIPS, the learned perceptual distance of two images.

With f_l the activations at the l-th tap of a trunk, scaled to length 1 at every pixel, and w_l
learned non-negative weights of the channels,

    d(x, y) = sum_l mean_pixels w_l . (f_l(x) - f_l(y))^2                                 (1)

The trunk is AlexNet or VGG-16 trained on ImageNet. No weights come with this package: `load` reads
torchvision's file of the trunk and the `lpips` package's file of the heads w_l (version 0.1), or
safetensors files with the same names.

Sources: Zhang et al. (2018, arXiv 1801.03924), equation 1; AlexNet in the single-column form of
Krizhevsky (2014, arXiv 1404.5997).
"""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from conprediff_jax.common.errors import UserError
from conprediff_jax.metrics.networks.vgg16 import VGG16
from conprediff_jax.weights import cached
from conprediff_jax.weights.tensors import Table, parameter_shapes

Images = Float[Array, "batch height width 3"]
Pictures = UInt8[np.ndarray, "batch height width 3"]
Distance = Callable[[Pictures, Pictures], Float[np.ndarray, "batch"]]

# ImageNet's mean and deviation, for images in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class AlexNet(nn.Module):
    """The convolutional part of AlexNet; float32.

    Its layers have torchvision's names, `features_0` to `features_10`.
    """

    @nn.compact
    def __call__(self, x: Images) -> list[Float[Array, "batch _h _w _c"]]:
        """The outputs of the five ReLUs.

        Args:
            x: Images scaled by `SHIFT` and `SCALE`, at least 31 pixels a side.
        """

        def layer(x: Array, index: int, channels: int, kernel: int, stride: int = 1) -> Array:
            # The padding is half the kernel, but less for the wide first kernel.
            padding = 2 if index == 0 else kernel // 2
            conv = nn.Conv(
                channels,
                (kernel, kernel),
                stride,
                padding=padding,
                precision="highest",
                name=f"features_{index}",
            )
            return nn.relu(conv(x))

        def pool(x: Array) -> Array:
            return nn.max_pool(x, (3, 3), (2, 2))

        first = layer(x, 0, 64, 11, stride=4)
        second = layer(pool(first), 3, 192, 5)
        third = layer(pool(second), 6, 384, 3)
        fourth = layer(third, 8, 256, 3)
        return [first, second, third, fourth, layer(fourth, 10, 256, 3)]


TRUNKS = {"alexnet": AlexNet, "vgg16": VGG16}
SMALLEST_IMAGE = {"alexnet": 31, "vgg16": 16}


class LPIPS(nn.Module):
    """The distance (1), in float32.

    Its parameters are `trunk/features_<n>` and `head_<l>`, which `load` reads.

    Attributes:
        network: The trunk, a key of `TRUNKS`.

    Raises:
        ValueError: The trunk is unknown.
    """

    network: str = "vgg16"

    def __post_init__(self):
        if self.network not in TRUNKS:
            raise ValueError(f"network is {self.network!r}: choose one of {tuple(TRUNKS)}")
        super().__post_init__()

    @property
    def smallest_image(self) -> int:
        """The smallest side of an image in pixels."""
        return SMALLEST_IMAGE[self.network]

    @nn.compact
    def __call__(self, x: Images, y: Images) -> Float[Array, "batch"]:
        """The distances between the images of two batches, in [-1, 1]."""
        both = jnp.concatenate([x, y]).astype(jnp.float32)
        taps = TRUNKS[self.network](name="trunk")((both - jnp.array(SHIFT)) / jnp.array(SCALE))
        distance = jnp.zeros(len(x))
        for level, h in enumerate(taps):
            # The small constant keeps the gradient finite where no channel is active.
            unit = h * jax.lax.rsqrt(jnp.square(h).sum(axis=-1, keepdims=True) + 1e-20)
            squares = jnp.square(unit[: len(x)] - unit[len(x) :])
            head = nn.Dense(1, use_bias=False, precision="highest", name=f"head_{level}")
            distance += head(squares).mean(axis=(1, 2, 3))
        return distance


def load(
    model: LPIPS,
    trunk: str | os.PathLike,
    heads: str | os.PathLike,
    *,
    cache: str | os.PathLike = "~/.cache/conprediff_jax/weights",
) -> dict[str, Any]:
    """Reads the parameters from files, as NumPy arrays.

    Each file has the format of safetensors or of torch.

    Args:
        model: The network whose parameters are read.
        trunk: File of torchvision's weights (`features.0.weight` ...); those of the classifier are
            not read.
        heads: File of the `lpips` package's weights (`lin0.model.1.weight` ...).
        cache: Folder for converted files of torch.

    Raises:
        UserError: A file is missing, unreadable, or of another network.
    """
    cache = pathlib.Path(cache).expanduser()
    tensors = cached.read(trunk, cache) | cached.read(heads, cache)
    kept = {name: t for name, t in tensors.items() if not name.startswith("classifier.")}
    try:
        return table(model).read(kept)
    except ValueError as error:
        raise UserError(f"{trunk}, {heads}: {error}") from error


def distance(
    network: str, trunk: str | os.PathLike, heads: str | os.PathLike, *, cache: str | os.PathLike
) -> Distance:
    """The distance (1) as a compiled function of two batches of images.

    Args:
        network: A key of `TRUNKS`.
        trunk: See `load`.
        heads: See `load`.
        cache: See `load`.

    Raises:
        UserError: A file is missing, unreadable, or of another network.
    """
    model = LPIPS(network=network)
    params = jax.device_put(load(model, trunk, heads, cache=cache))

    @jax.jit
    def compute(x, y):
        return model.apply({"params": params}, x / 127.5 - 1, y / 127.5 - 1)

    return lambda x, y: np.asarray(compute(x, y))


def table(model: LPIPS) -> Table:
    """The names of the parameters in the two files, whose state dicts are joined."""
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = parameter_shapes(jax.eval_shape(model.init, jax.random.key(0), image, image)["params"])
    names, heads = {}, []
    for path in shapes:
        if path[0] == "trunk":
            part = "weight" if path[-1] == "kernel" else "bias"
            names[path] = f"{path[1].replace('_', '.')}.{part}"
        else:
            heads.append(path[0])
            names[path] = f"lin{path[0].removeprefix('head_')}.model.1.weight"
    return Table(
        model=f"LPIPS of {model.network}", shapes=shapes, names=names, pointwise=tuple(heads)
    )
