"""Measures by retrieval whether images show what their captions ask for.

    shown(x) = the attributes in the caption of the image nearest to x                    (1)

where the nearest image is searched among the images of a data set, by features or pixels. The
figure is the share of samples whose nearest image has the role, the gender, the skin tone, or all
attributes that the caption of the sample asks for. Captions and attributes are those of OpenMoji;
see `data.openmoji.captions`.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Shaped

from conprediff_jax.data.openmoji import captions as captions_lib
from conprediff_jax.metrics.precision_recall import nearest

ATTRIBUTES = (*captions_lib.Attributes._fields, "all")


def agreement(asked: Sequence[str], shown: Sequence[str]) -> dict[str, Bool[np.ndarray, "samples"]]:
    """Whether two captions agree, for every attribute, and for `all` attributes together.

    Args:
        asked: Captions that the samples were drawn for.
        shown: Captions that the samples match; see `retrieved`.

    Raises:
        ValueError: The two lists differ in length.
    """
    pairs = [
        (captions_lib.parse(a), captions_lib.parse(b)) for a, b in zip(asked, shown, strict=True)
    ]
    same = {
        name: np.array([getattr(a, name) == getattr(b, name) for a, b in pairs], bool)
        for name in captions_lib.Attributes._fields
    }
    return same | {"all": np.logical_and.reduce(list(same.values()))}


def retrieved(
    samples: Shaped[np.ndarray, "samples features"],
    reference: Shaped[np.ndarray, "images features"],
    captions: Sequence[str],
) -> list[str]:
    """The caption of every sample's nearest image, eq. (1).

    Args:
        samples: Features of the samples.
        reference: Features of the images of the data set.
        captions: Captions of these images.

    Raises:
        ValueError: There are not as many captions as images.
    """
    if len(captions) != len(reference):
        raise ValueError(f"{len(captions)} captions for {len(reference)} images: give one for each")
    return [captions[index] for index in nearest(samples, reference, k=1).indices[:, 0]]
