"""The convolutions of VGG-16, and their published weights.

    stage s = 1 ... 5:   (3x3 convolution, ReLU) x n_s,   n = 2, 2, 3, 3, 3,   max-pool 2x2 between

with 64, 128, 256, 512 and 512 channels. Source: Simonyan and Zisserman 2015 (arXiv 1409.1556),
configuration D.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from conprediff_jax.interop import tensors

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, convolutions


class VGG16(nn.Module):
    """The convolutional part of VGG-16; float32.

    Its parameters are named as torchvision names them, `features_0` to `features_28`.
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width 3"]
    ) -> list[Float[Array, "batch _h _w _c"]]:
        """The last ReLU of each of the five stages (relu1_2, relu2_2, relu3_3, relu4_3, relu5_3).

        Args:
            x: images, scaled as the weights want them; at least 16 pixels a side.
        """
        taps, index = [], 0
        for channels, convolutions in STAGES:
            if taps:
                x = nn.max_pool(x, (2, 2), (2, 2))
                index += 1
            for _ in range(convolutions):
                x = nn.Conv(
                    channels, (3, 3), padding=1, name=f"features_{index}", precision="highest"
                )(x)
                x = nn.relu(x)
                index += 2
            taps.append(x)
        return taps


def parameter_shapes() -> dict[tensors.Path, tuple[int, ...]]:
    """The shape of every parameter, by path, in the order of the layers."""
    image = jnp.zeros((1, 16, 16, 3))
    params = jax.eval_shape(VGG16().init, jax.random.key(0), image)["params"]
    shapes = tensors.parameter_shapes(params)
    return dict(sorted(shapes.items(), key=lambda item: int(item[0][0].split("_")[1])))


def params_from_torchvision(state_dict: Mapping[str, np.ndarray]) -> dict:
    """The parameters out of torchvision's `vgg16` state dict; its classifier is left aside.

    Args:
        state_dict: NumPy arrays by torchvision's names, `features.0.weight` and so on.

    Raises:
        ValueError: a tensor is missing, left over or of another shape than VGG-16's.
    """
    trunk = {k: v for k, v in state_dict.items() if not k.startswith("classifier.")}
    return _table().read(trunk)


def params_to_torchvision(params: Mapping) -> dict[str, np.ndarray]:
    """The state dict of the parameters, by torchvision's names, without a classifier."""
    return _table().write(params)


def _table() -> tensors.Table:
    shapes = parameter_shapes()
    names = {
        path: path[0].replace("_", ".") + (".weight" if path[-1] == "kernel" else ".bias")
        for path in shapes
    }
    return tensors.Table(model="VGG-16", shapes=shapes, names=names)
