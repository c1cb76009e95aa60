"""Features of a VGG-16 with fixed random weights, for `FD-random-VGG16`.

For images far from ImageNet, or without pretrained weights, a random network is a published
substitute (Naeem et al. 2020, arXiv 2002.09797, which uses its last layer). This one uses the
outputs of all stages, because the last stage alone hardly tells noise from drawings. Its complete
definition follows, so that its numbers can be reproduced in any language:

    bits        64-bit outputs, in order, of Philox-4x64-10 with key (16, 0), counter from 1
    u           (bits >> 11) / 2^53, in [0, 1)
    weight      (2 u - 1) sqrt(6 / fan_in)   (He et al. 2015); bias 0
    order       the 13 convolutions from input to output, each [out, in, row, column], then the
                projections of stages 1 to 5, each [32, channels]
    input       image / 127.5 - 1 at its own size; where that is under 32 pixels a side, each pixel
                is first repeated by the smallest whole factor that makes it 32
    features    of every stage, the projection of the mean over places of its last ReLU (relu1_2,
                relu2_2, relu3_3, relu4_3, relu5_3); 5 x 32 numbers

A distance depends on the size of the images, which must be the same on both sides. Do not call it
FID.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, UInt8

from conprediff_jax.metrics.networks.vgg16 import VGG16

KEY = 16
FEATURES = 32  # of each stage
LEAST = 32  # smallest side in pixels of the network's input


class RandomVGG16(nn.Module):
    """The network; its parameters come from the function `params`, and not from `init`."""

    @nn.compact
    def __call__(
        self, images: UInt8[Array, "batch height width 3"]
    ) -> Float[Array, "batch features"]:
        """The features of images, float32."""
        repeats = -(-LEAST // min(images.shape[1:3]))
        x = images.repeat(repeats, axis=1).repeat(repeats, axis=2)
        x = x.astype(jnp.float32) / 127.5 - 1
        features = []
        for stage, tap in enumerate(VGG16(name="trunk")(x), 1):
            project = nn.Dense(
                FEATURES, use_bias=False, precision="highest", name=f"projection_{stage}"
            )
            features.append(project(tap.mean(axis=(1, 2))))
        return jnp.concatenate(features, axis=-1)


def params() -> dict:
    """The parameters, float32 NumPy arrays, which are always the same."""
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


def _place(path: tuple[str, ...]) -> tuple[bool, int]:
    """The place of a parameter in the order of the draws; the projections come last."""
    layer = path[-2]
    return layer.startswith("projection"), int(layer.split("_")[1])
