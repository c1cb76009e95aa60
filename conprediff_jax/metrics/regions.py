"""Measures how well a region of an image was filled.

    PSNR = 10 log10(255^2 / MSE), with the MSE over the region's pixels and channels            (1)

    SSIM = mean over the region and channels of
           (2 m_x m_y + c_1)(2 s_xy + c_2) / ((m_x^2 + m_y^2 + c_1)(s_x^2 + s_y^2 + c_2))       (2)

with m and s the local moments under a Gaussian window of deviation 1.5 that is 11 pixels wide,
c_1 = (0.01 x 255)^2 and c_2 = (0.03 x 255)^2. The image is mirrored beyond its edges. The window of
a pixel near the rim of the region includes pixels outside the region.

    spread = mean over pairs of fillings of the root of their mean squared difference over the
             region, as a share of 255                                                          (3)

Source of (2), its window and its constants: Wang et al. 2004, "Image Quality Assessment: From Error
Visibility to Structural Similarity", eq. (13).
"""

import itertools

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

Image = UInt8[np.ndarray, "height width 3"]
Region = Bool[np.ndarray, "height width"]

_ROUNDING = 1 / 12  # squared error of rounding to whole levels
_WINDOW = {"sigma": 1.5, "radius": 5, "axes": (0, 1), "mode": "reflect"}
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(image: Image, truth: Image, region: Region) -> float:
    """Equation (1), in dB.

    Errors below the error of rounding to whole levels count as that error. So no figure exceeds
    58.9 dB, and a perfect filling does not make a mean infinite.

    Args:
        image: The filled image.
        truth: The original image.
        region: True for pixels of the region; not empty.
    """
    return float(10 * np.log10(255**2 / max(_squared_error(image, truth, region), _ROUNDING)))


def ssim(image: Image, truth: Image, region: Region) -> float:
    """Equation (2); the arguments are those of `psnr`."""
    return float(_ssim_map(image.astype(np.float64), truth.astype(np.float64))[region].mean())


def spread(images: UInt8[np.ndarray, "fillings height width 3"], region: Region) -> float:
    """Equation (3): how much the fillings of one hole differ; 0 for a single one.

    Args:
        images: The fillings.
        region: True for pixels of the region; not empty.
    """
    pairs = itertools.combinations(images, 2)
    distances = [np.sqrt(_squared_error(*pair, region)) / 255 for pair in pairs]
    return float(np.mean(distances)) if distances else 0.0


def _squared_error(x: Image, y: Image, region: Region) -> float:
    return np.square(x[region].astype(np.float64) - y[region]).mean()


def _ssim_map(
    x: Float[np.ndarray, "height width 3"], y: Float[np.ndarray, "height width 3"]
) -> Float[np.ndarray, "height width 3"]:
    """The terms of equation (2) for every pixel and channel."""

    def local(image: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(image, **_WINDOW)

    mean_x, mean_y = local(x), local(y)
    variances = local(x * x) - mean_x**2 + local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    return luminance * (2 * covariance + _C2) / (variances + _C2)
