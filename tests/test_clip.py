"""Tests of CLIP, its image preprocessing and its score against transformers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import pre_tokenizers
from torch import nn

from conprediff_jax.common.errors import UserError
from conprediff_jax.metrics import clip_score
from conprediff_jax.metrics.networks import clip


def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of random weights as transformers writes it, with a small vocabulary."""
    import transformers

    folder = tmp_path_factory.mktemp("clip")
    merges = ["a n", "an d</w>", "c a", "ca t</w>", "r e", "re d</w>", "i n", "t h", "th e</w>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*alphabet, *(symbol + "</w>" for symbol in alphabet)]
    symbols += ["".join(merge.split()) for merge in merges]
    vocabulary = {s: i for i, s in enumerate([*symbols, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = small | {
        "num_hidden_layers": 2, "vocab_size": len(vocabulary), "max_position_embeddings": 16,
        "bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1,
    }  # fmt: skip
    vision = small | {"num_hidden_layers": 1, "image_size": 24, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    model = transformers.CLIPModel(config).eval()
    for parameter in model.parameters():  # such that nothing is too small to matter
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


CAPTIONS = ("The cat", "and the RED cat's 42 hats", "naïve  \tcafé — don't; 日本 🙂", "a " * 40)


def test_clip_score_equals_transformers(clip_folder, tmp_path):
    import transformers

    loaded = clip.load(clip_folder, tmp_path)
    images = rng().integers(0, 256, (4, 24, 24, 3), np.uint8)
    pixels = (images / 255 - np.array(clip.MEAN)) / np.array(clip.STD)
    theirs = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        out = theirs(
            input_ids=torch.from_numpy(loaded.tokenizer(CAPTIONS)).long(),
            pixel_values=torch.from_numpy(pixels).float().permute(0, 3, 1, 2),
        )
    expected = 100 * (out.image_embeds * out.text_embeds).sum(-1)
    found = clip_score.clip_scores(loaded, iter([images[:3], images[3:]]), CAPTIONS)
    np.testing.assert_allclose(found, expected.clip(0), atol=1e-3)
    assert (found > 0).any()
    with pytest.raises(ValueError, match="3 captions for more images"):
        clip_score.clip_scores(loaded, iter([images]), CAPTIONS[:3])


def test_prepared_images_are_those_of_transformers():
    import transformers

    wide = rng().integers(0, 256, (1, 40, 61, 3), np.uint8)
    resize = transformers.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24)
    expected = resize(Image.fromarray(wide[0]), do_rescale=False, do_normalize=False)
    found = clip.prepare(wide, 24)[0]
    np.testing.assert_array_equal(np.asarray(expected["pixel_values"][0]).transpose(1, 2, 0), found)


def test_a_clip_with_other_weights_is_refused(clip_folder, tmp_path):
    for name in ("vocab.json", "merges.txt", "model.safetensors"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    with pytest.raises(UserError, match=r"no CLIP with a readable config\.json"):
        clip.load(tmp_path, tmp_path)
    config = json.loads((clip_folder / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="weights do not fit the CLIP"):
        clip.load(tmp_path, tmp_path)
