"""Tests of retrieval by attributes, on OpenMoji's own drawings, whose captions are known."""

import dataclasses

import numpy as np
import pytest
from study.attributes import agreement, retrieved

from conprediff_jax import data
from conprediff_jax.data.openmoji.captions import held_out


def test_agreement_is_by_attribute():
    asked = ["woman farmer dark skin tone", "man farmer light skin tone", "old person", "girl"]
    shown = ["woman farmer light skin tone", "man farmer light skin tone", "older man", "woman"]
    found = agreement(asked, shown)
    assert found["role"].tolist() == [True, True, True, False]
    assert found["gender"].tolist() == [True, True, False, True]
    assert found["skin_tone"].tolist() == [False, True, True, True]
    assert found["all"].tolist() == [False, True, False, False]
    with pytest.raises(ValueError, match="shorter"):
        agreement(asked, shown[:3])


def test_damaged_drawings_are_recognised_but_held_out_combinations_are_not_among_training_images():
    pixels, captions = {}, {}
    for split in ("train", "test"):
        spec = data.DataSpec(name="openmoji/combinations", split=split, image_size=32, label=None)
        batches = data.evaluation_iterator(spec, batch_size=64)
        pixels[split] = np.concatenate([batch["image"][batch["mask"]] for batch in batches])
        captions[split] = list(data.captions(dataclasses.replace(spec, text="caption")))
    flat = {split: x.reshape(len(x), -1).astype(np.float32) for split, x in pixels.items()}
    noise = np.random.default_rng(0).normal(size=flat["test"].shape).astype(np.float32)
    every = np.concatenate([flat["train"], flat["test"]])
    names = captions["train"] + captions["test"]
    damaged = agreement(captions["test"], retrieved(flat["test"] + 5 * noise, every, names))
    assert min(damaged["role"].mean(), damaged["skin_tone"].mean()) > 0.95
    assert damaged["all"].mean() > 0.8  # a person and a man are often the same drawing

    assert all(map(held_out, captions["test"]))
    among = agreement(captions["test"], retrieved(flat["test"], flat["train"], captions["train"]))
    assert not among["all"].any()
    assert among["role"].mean() > 0.9  # 0.96: the same figure in another colour
    with pytest.raises(ValueError, match="give one for each"):
        retrieved(flat["test"], every, captions["train"])
