"""DINOv2 and the distance on its features, against transformers and torch with random weights."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from conprediff_jax.common.errors import UserError
from conprediff_jax.metrics import features
from conprediff_jax.metrics.networks import dinov2


def pictures(count, side):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network of random weights as transformers writes it, for images of 6 x 6 patches."""
    import transformers

    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=84, patch_size=14
    )
    model = transformers.Dinov2Model(config).eval()
    for parameter in model.parameters():  # such that nothing is too small to matter
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("side", [84, 224], ids=["as trained", "positions interpolated"])
def test_features_equal_those_of_transformers(side, folder, tmp_path):
    import transformers

    images = pictures(2, side)
    pixels = (images / 255 - np.array(dinov2.MEAN)) / np.array(dinov2.STD)
    theirs = transformers.Dinov2Model.from_pretrained(folder).eval()
    with torch.no_grad():
        given = torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)
        expected = theirs(given).pooler_output.numpy()
    model, params = dinov2.load(folder, tmp_path)
    found = np.asarray(model.apply({"params": params}, jnp.asarray(images)))
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("side", [32, 300], ids=["enlarged", "reduced"])
def test_images_are_resized_as_pillow_does(side):
    smooth = [Image.fromarray(i).resize((side, side)) for i in pictures(2, 8)]
    expected = [i.resize((224, 224), Image.Resampling.BICUBIC) for i in smooth]
    found = np.asarray(dinov2.resized(jnp.stack([np.asarray(i) for i in smooth])))
    expected = np.stack([np.asarray(i) for i in expected])
    off = np.abs(found.astype(int) - expected)
    # Pillow rounds to bytes between the rows and the columns, too.
    assert off.max() <= 2 and (off > 1).mean() < 1e-3


def test_the_distance_has_its_own_name_and_another_network_is_refused(folder, tmp_path):
    extractor = features.dinov2_extractor(folder, tmp_path)
    assert extractor.labels["frechet"] == "FD-DINOv2"
    assert extractor.apply(extractor.params, jnp.asarray(pictures(1, 32)))["pool"].shape == (1, 32)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match=r"no DINOv2 with a readable config.json: it must have"):
        features.dinov2_extractor(tmp_path / "other", tmp_path)
