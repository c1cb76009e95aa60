"""The convolutions of VGG-16.

    stage s = 1 ... 5:   (3x3 convolution, ReLU) x n_s,   n = 2, 2, 3, 3, 3,   max-pool 2x2 between

with 64, 128, 256, 512 and 512 channels. Source: Simonyan and Zisserman 2015 (arXiv 1409.1556),
configuration D.
"""

import flax.linen as nn
from jaxtyping import Array, Float

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, convolutions


class VGG16(nn.Module):
    """The convolutional part of VGG-16; float32.

    Its layers have torchvision's names, `features_0` to `features_28`.
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width 3"]
    ) -> list[Float[Array, "batch _h _w _c"]]:
        """The output of the last ReLU of each stage (relu1_2, relu2_2, relu3_3, relu4_3, relu5_3).

        Args:
            x: Images, scaled as the weights require, at least 16 pixels a side.
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
