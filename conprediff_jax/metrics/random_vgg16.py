"""Features of a VGG-16 with fixed random weights, for `FD-random-VGG16`.

For images far from ImageNet, or where no pretrained weights can be had, a random network is a
published substitute (Naeem et al. 2020, arXiv 2002.09797, the embeddings "R64"). Everything about
this one is defined here, so that its numbers can be repeated in any language:

    bits        64-bit outputs, in order, of Philox-4x64-10 with key (16, 0), counter from 1
    u           (bits >> 11) / 2^53, in [0, 1)
    weight      (2 u - 1) sqrt(6 / fan_in)   (He et al. 2015); bias 0
    order       the 13 convolutions from input to output, each [out, in, row, column], then the
                projection [64, 512]
    input       image / 127.5 - 1 at its own size; where that is under 32 pixels a side, each pixel
                is first repeated by the smallest whole factor that makes it 32
    features    projection of the mean over places of relu5_3; 64 numbers

A distance depends on the size of the images; both sides must have the same. It is never to be
called FID.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, UInt8

from conprediff_jax.metrics.vgg16 import VGG16

KEY = 16
FEATURES = 64
LEAST = 32


class RandomVGG16(nn.Module):
    """The network; its parameters come from `params`, not from `init`."""

    @nn.compact
    def __call__(
        self, images: UInt8[Array, "batch height width 3"]
    ) -> Float[Array, "batch features"]:
        """Features, float32."""
        repeats = -(-LEAST // min(images.shape[1:3]))
        x = images.repeat(repeats, axis=1).repeat(repeats, axis=2)
        x = x.astype(jnp.float32) / 127.5 - 1
        pooled = VGG16(name="trunk")(x)[-1].mean(axis=(1, 2))
        return nn.Dense(FEATURES, use_bias=False, precision="highest", name="projection")(pooled)


def params() -> dict:
    """The parameters, float32 NumPy arrays: always the same."""
    image = jax.ShapeDtypeStruct((1, LEAST, LEAST, 3), jnp.uint8)
    tree = jax.eval_shape(RandomVGG16().init, jax.random.key(0), image)["params"]
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree).items()}
    bits = np.random.Philox(key=KEY)
    drawn = {}
    for path in sorted(shapes, key=_place):
        shape = shapes[path]
        if path[-1] == "bias":
            drawn[path] = np.zeros(shape, np.float32)
            continue
        *window, inputs, outputs = shape
        fan_in = inputs * int(np.prod(window))
        uniform = (bits.random_raw(fan_in * outputs) >> np.uint64(11)) * 2.0**-53
        weights = ((2 * uniform - 1) * np.sqrt(6 / fan_in)).astype(np.float32)
        weights = weights.reshape(outputs, inputs, *window)
        drawn[path] = np.moveaxis(weights, (0, 1), (-1, -2))
    return traverse_util.unflatten_dict(drawn)


def _place(path: tuple[str, ...]) -> int:
    """Where in the network a parameter is; the projection comes last."""
    return int(path[1].split("_")[1]) if path[0] == "trunk" else 99
