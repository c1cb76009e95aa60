"""Tests of OpenMoji and the captions of data sets: their words and their token ids."""

import io

import numpy as np
import pytest
from PIL import Image

from conprediff_jax import data
from conprediff_jax.data import latents
from conprediff_jax.data.tfds import make_builder, prepare


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("tfds"))
    prepare("openmoji/people", root)
    return root


def test_openmoji_has_pictures_captions_and_categories(tfds_dir):
    by_name = {"name": "openmoji/people", "data_dir": tfds_dir}
    fields = {"keep": ["caption"], "label": "category", "image_size": 32, "threads": 2}
    spec = data.DataSpec(**by_name, **fields)
    batch = next(data.make_iterator(spec, batch_size=64, seed=0))
    data.check_batch(batch, spec, batch_size=64, num_classes=5)
    assert set(batch["label"]) <= {0, 1}  # faces and persons
    assert (batch["image"][:, 0, 0] >= 250).mean() > 0.8  # the corners are white
    assert batch["image"].std(axis=(1, 2, 3)).min() > 10  # and none is empty

    # The same files by their path, and the two splits: nothing in both.
    directory = f"{tfds_dir}/openmoji/people/17.0.0"
    splits = {
        split: [
            data.open_data(data.DataSpec(name=directory, split=split, **fields))[i]["caption"]
            for i in range(100)
        ]
        for split in ("train", "test")
    }
    assert not set(splits["train"]) & set(splits["test"])
    sizes = [data.num_examples(data.DataSpec(**by_name, split=s)) for s in ("train", "test")]
    assert sum(sizes) == 1611 and 0.08 < sizes[1] / sum(sizes) < 0.12
    info = make_builder("openmoji/people", tfds_dir).info
    assert "OpenMoji" in info.description and "CC BY-SA 4.0" in info.description


def test_captions_become_token_ids(tfds_dir):
    fields = {"data_dir": tfds_dir, "image_size": 8, "threads": 2, "text": "caption"}
    spec = data.DataSpec(name="openmoji/people", **fields)
    captions = list(data.captions(spec))
    assert len(captions) == data.num_examples(spec) and "astronaut" in captions
    assert list(data.captions(spec, limit=10)) == [
        captions[i * len(captions) // 10] for i in range(10)
    ]
    tokenizer = data.Tokenizer.train(captions, vocab_size=512, length=14)
    lost = tokenizer.report(captions)
    assert (lost.truncated, lost.unknown) == (0, 0)

    batch = next(data.make_iterator(spec, batch_size=16, seed=0, tokenizer=tokenizer))
    assert batch["text"].dtype == np.int32 and batch["text"].shape == (16, 14)
    np.testing.assert_array_equal(batch["text"], tokenizer(batch["caption"]))
    data.check_batch(batch, spec, batch_size=16, tokenizer=tokenizer)
    plain = next(data.make_iterator(spec, batch_size=16, seed=0))
    np.testing.assert_array_equal(plain["text"], batch["caption"])
    np.testing.assert_array_equal(plain["image"], batch["image"])
    last = list(data.evaluation_iterator(spec, batch_size=100, tokenizer=tokenizer))[-1]
    np.testing.assert_array_equal(last["text"][-1], tokenizer(captions[-1:])[0])

    with pytest.raises(data.DataError, match=r"expected token ids, \(16, 14\) and int32"):
        data.check_batch(plain, spec, batch_size=16, tokenizer=tokenizer)
    del batch["text"]
    with pytest.raises(data.DataError, match="has no texts, which the model reads"):
        data.check_batch(batch, spec, batch_size=16, tokenizer=tokenizer)
    without = data.DataSpec(name="openmoji/people", data_dir=tfds_dir)
    for iterate in (data.make_iterator, data.evaluation_iterator):
        options = {} if iterate is data.evaluation_iterator else {"seed": 0}
        with pytest.raises(ValueError, match="text is None; it must name the feature"):
            iterate(without, batch_size=1, tokenizer=tokenizer, **options)
    with pytest.raises(ValueError, match="text is None; it must name the feature"):
        next(data.captions(without))


@pytest.fixture(scope="module")
def several_captions(tmp_path_factory):
    """A TFDS data set as COCO's captions are written: image i has i captions."""
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
        }
    )
    texts = [[f"caption {j} of {i}" for j in range(i)] for i in range(4)]
    images = [np.full((4, 4, 3), 10 + i, np.uint8) for i in range(4)]
    root = str(tmp_path_factory.mktemp("several"))
    builder = tfds.dataset_builders.store_as_tfds_dataset(
        name="several",
        version="1.0.0",
        features=features,
        split_datasets={
            "train": [
                (i, {"image": images[i], "captions": {"id": [*range(i)], "text": texts[i]}})
                for i in range(4)
            ]
        },
        data_dir=root,
        file_format="array_record",
        disable_shuffling=True,
    )
    return builder.data_path, texts


def test_one_of_an_images_captions_is_drawn_every_epoch(several_captions):
    path, texts = several_captions
    spec = data.DataSpec(name=str(path), text="caption", image_size=4, threads=0)
    assert list(data.captions(spec)) == [text for one in texts for text in one]
    tokenizer = data.Tokenizer.train(data.captions(spec), vocab_size=40, length=16)
    iterator = data.make_iterator(spec, batch_size=4, seed=0, tokenizer=tokenizer)
    seen = {i: [] for i in range(4)}
    for _ in range(60):
        batch = next(iterator)
        np.testing.assert_array_equal(batch["text"], tokenizer(batch["caption"]))
        for number, caption in zip(batch["image"][:, 0, 0, 0] - 10, batch["caption"], strict=True):
            seen[int(number)].append(str(caption))
    assert set(seen[0]) == {""} and {number: set(texts[number]) for number in (1, 2, 3)} == {
        number: set(seen[number]) for number in (1, 2, 3)
    }
    assert 10 < seen[3].count(texts[3][0]) < 30
    options = {"size": 4, "text": "caption", "tokenizer": tokenizer}
    record = {"image": b"", "latent": np.zeros((1, 1, 3)), "name": "", "caption": texts[2]}
    latent = latents.ToLatentExample(**options).make(record, offset=0.0, mirrored=False, choice=0.9)
    np.testing.assert_array_equal(latent["text"], tokenizer(texts[2][1:])[0])
    once = next(iter(data.evaluation_iterator(spec, batch_size=4)))
    assert list(once["text"]) == ["", *(one[0] for one in texts[1:])]


def test_openmoji_names_and_categories():
    from conprediff_jax.data.openmoji import openmoji_dataset_builder as openmoji

    categories = dict(openmoji.drawings().values())
    assert len(categories) == len(openmoji.drawings())  # no two drawings share a caption
    expected = {
        "woman health worker medium skin tone": "person",
        "astronaut dark skin tone": "person",
        "woman medium-light skin tone red hair": "person",
        "grinning face": "face",
        "dog face": "other",
        "baby bottle": "other",
        "people holding hands": "group",
        "flag of Iceland": "flag",
        "eight o'clock": "other",
    }
    assert {caption: categories[caption] for caption in expected} == expected
    assert "red hair" not in categories  # a component, not an emoji


def test_openmoji_captions_say_role_gender_and_skin_tone():
    from conprediff_jax.data.openmoji import captions

    expected = {
        "woman health worker medium skin tone": ("health worker", "woman", "medium"),
        "astronaut dark skin tone": ("astronaut", "person", "dark"),
        "man medium-light skin tone red hair": ("red hair", "man", "medium-light"),
        "deaf woman": ("deaf", "woman", None),
        "older person light skin tone": ("old", "person", "light"),
        "old man light skin tone": ("old", "man", "light"),
        "boy medium-dark skin tone": ("child", "man", "medium-dark"),
        "man feeding baby": ("feeding baby", "man", None),
        "person": ("", "person", None),
    }
    assert {caption: tuple(captions.parse(caption)) for caption in expected} == expected


def test_openmoji_holds_out_combinations_of_what_is_known(tmp_path, monkeypatch):
    from conprediff_jax.data.openmoji import captions
    from conprediff_jax.data.openmoji import openmoji_dataset_builder as openmoji

    blank = io.BytesIO()
    Image.new("RGB", (openmoji.SIZE, openmoji.SIZE)).save(blank, "PNG")
    monkeypatch.setattr(openmoji, "render", lambda *_: blank.getvalue())  # in no time
    prepare("openmoji/combinations", str(tmp_path))
    splits = {}
    for split in ("train", "test"):
        spec = data.DataSpec(
            name="openmoji/combinations", data_dir=str(tmp_path), split=split, text="caption"
        )
        splits[split] = [captions.parse(caption) for caption in data.captions(spec)]
    train, test = splits["train"], splits["test"]
    assert (len(train), len(test)) == (1361, 250) and len({*train, *test}) == 1611
    known = {(person.role, person.gender) for person in train}
    assert all((person.role, person.gender) in known for person in test)
    # Each tone of a role is known of another gender, unless the role has one gender alone.
    known = {(person.role, person.skin_tone) for person in train}
    alone = {person.role for person in test if (person.role, person.skin_tone) not in known}
    genders = {role: {p.gender for p in {*train, *test} if p.role == role} for role in alone}
    assert all(len(found) == 1 for found in genders.values()) and len(alone) == 8
    tones = [person.skin_tone for person in test]
    assert min(map(tones.count, captions.SKIN_TONES)) > 40


def test_a_missing_feature_names_those_there_are(tfds_dir):
    for wrong in ({"keep": ["title"]}, {"label": "kind"}):
        spec = data.DataSpec(name="openmoji/people", data_dir=tfds_dir, **wrong)
        with pytest.raises(data.DataError, match=r"no feature .*; it has caption, category, image"):
            data.open_data(spec)
