"""CLIP score: how well images show what their captions say.

    score = mean_i max(100 cos(E_image(i), E_text(i)), 0)

Source: Hessel et al. 2021 (arXiv 2104.08718), with the factor 100, which is usual now, instead of
the paper's 2.5.
"""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Float, UInt8

from conprediff_jax.metrics.networks.clip import CLIP, Loaded, prepare


def clip_scores(
    clip: Loaded,
    batches: Iterator[UInt8[np.ndarray, "_batch height width 3"]],
    captions: Sequence[str],
) -> Float[np.ndarray, "images"]:
    """The score of every image with its caption, float32.

    Args:
        clip: Both towers and their tokenizer.
        batches: Batches of images, in the order of the captions.
        captions: Captions, one for each image.

    Raises:
        ValueError: There are more or fewer images than captions.
    """
    model, params, tokenizer = clip

    @jax.jit
    def score(params, images, tokens):
        variables = {"params": params}
        of_images = model.apply(variables, images, method=CLIP.embed_images)
        of_texts = model.apply(variables, tokens, tokenizer.end, method=CLIP.embed_texts)
        return (100 * (of_images * of_texts).sum(axis=-1)).clip(0)

    params = jax.device_put(params)
    scores, first = [], 0
    for images in batches:
        texts = captions[first : first + len(images)]
        first += len(images)
        if len(texts) < len(images):
            raise ValueError(f"{len(captions)} captions for more images: one a line for each image")
        pixels = prepare(images, model.image_size)
        scores.append(np.asarray(score(params, pixels, tokenizer(texts))))
    if first < len(captions):
        raise ValueError(f"{len(captions)} captions for {first} images: one a line for each image")
    return np.concatenate([np.empty(0, np.float32), *scores])
