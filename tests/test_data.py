"""Tests of the data pipeline: what it yields, in which order, and its errors."""

import io
import itertools
import subprocess
import sys

import grain
import numpy as np
import pytest
from absl import flags
from absl import logging as absl_logging
from etils import epath
from PIL import Image

from conprediff_jax import data
from conprediff_jax.data import transforms
from conprediff_jax.data.tfds import TfdsSource
from conprediff_jax.runs.batches import Batches

pytestmark = pytest.mark.every_python

COUNT = 20  # images in the numbered folder, whose image i has the value 10 + i everywhere


def file_bytes(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.fixture(scope="session")
def numbered(tmp_path_factory):
    root = tmp_path_factory.mktemp("numbered")
    for i in range(COUNT):
        Image.new("RGB", (6, 4), (10 + i,) * 3).save(root / f"{i:02d}.png")
    return root


@pytest.fixture
def damaged(tmp_path, numbered):
    """The same data with images 3 and 11 cut short."""
    for path in sorted(numbered.glob("*.png")):
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[:40] if path.stem in ("03", "11") else content)
    return tmp_path


def spec_of(root, **changes):
    return data.DataSpec(name=str(root), **{"image_size": 4, "threads": 2, **changes})


def numbers(batch):
    return [int(value) - 10 for value in batch["image"][:, 0, 0, 0]]


def stream(root, batches, *, seed=0, batch_size=4, index=0, count=1, **changes):
    """The numbers of the images in the first batches."""
    iterator = data.make_iterator(
        spec_of(root, **changes),
        batch_size=batch_size,
        seed=seed,
        process_index=index,
        process_count=count,
    )
    return [number for _ in range(batches) for number in numbers(next(iterator))]


def test_every_epoch_is_a_permutation_of_its_own(numbered):
    two = stream(numbered, 10)
    first, second = two[:COUNT], two[COUNT:]
    assert sorted(first) == sorted(second) == list(range(COUNT))
    assert first != second and first != sorted(first)
    assert two == stream(numbered, 10, threads=0)  # same seed, other threads
    assert two != stream(numbered, 10, seed=1)
    assert stream(numbered, 5, shuffle=False) == list(range(COUNT))


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_divide_every_epoch(numbered, processes):
    # Place k of the global stream is the (k // P)-th of process k % P. Three do not divide 20.
    steps = 15
    shares = [stream(numbered, steps, index=i, count=processes) for i in range(processes)]
    together = [number for place in zip(*shares, strict=True) for number in place]
    assert together == stream(numbered, steps * processes)
    assert sorted(together[:COUNT]) == list(range(COUNT))


def test_a_restored_iterator_goes_on_bit_for_bit(damaged):
    def start():
        spec = spec_of(damaged, flip=True, crop="random")
        return data.make_iterator(spec, batch_size=4, seed=5)

    iterator = start()
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator)["image"] for _ in range(12)]
    other = start()
    other.set_state(state)
    np.testing.assert_array_equal([next(other)["image"] for _ in range(12)], expected)
    iterator.set_state(state)  # and back, in an iterator that has read ahead
    np.testing.assert_array_equal(next(iterator)["image"], expected[0])
    assert not {3, 11} & set(numbers({"image": np.concatenate(expected)}))


@pytest.mark.parametrize("changes", [{}, {"flip": True}, {"crop": "random", "jitter": 0.2}])
@pytest.mark.parametrize("threads", [0, 3])
def test_batches_are_what_examples_are_one_by_one(tmp_path, changes, threads):
    """JPEGs that are decoded into their batch, others, and one that is missing in each epoch."""
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3), np.uint8)
    for i, values in enumerate(pixels):
        image = Image.fromarray(values).resize((16, 20) if i % 7 == 3 else (16, 16))
        image.save(tmp_path / f"{i:02}.{'png' if i % 5 == 1 else 'jpg'}", quality=90)
    (tmp_path / "05.jpg").write_bytes((tmp_path / "05.jpg").read_bytes()[:200])
    spec = spec_of(tmp_path, image_size=16, threads=threads, **changes)
    records = grain.MapDataset.source(data.open_data(spec)).seed(9).shuffle().repeat()
    one_by_one = records.random_map(transforms.ToExample(size=16, **changes))
    expected = (e["image"] for e in map(one_by_one.__getitem__, range(60)) if isinstance(e, dict))
    batches = data.make_iterator(spec, batch_size=4, seed=9)
    for _ in range(12):
        batch = next(batches)["image"]
        np.testing.assert_array_equal(batch, list(itertools.islice(expected, 4)))


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0), (2, 0)])
def test_a_restored_iterator_may_have_other_workers(numbered, tmp_path, before, after):
    """It continues with the next record: nothing of an epoch is left out or seen twice."""
    flags.FLAGS.mark_as_parsed()  # as a command has, where grain starts processes

    def batches(workers):
        spec = spec_of(numbered, workers=workers)
        return Batches(data.make_iterator(spec, batch_size=4, seed=0), (0, 1))

    first = batches(before)
    seen = [numbers(next(first)) for _ in range(3)]
    (tmp_path / "process_0-of-1.json").write_bytes(first.get_state())
    second = batches(after)
    second.restore(epath.Path(tmp_path))
    seen += [numbers(next(second)) for _ in range(2)]
    assert sorted(np.concatenate(seen)) == list(range(COUNT))


@pytest.mark.parametrize(("workers", "threads"), [(0, 0), (3, 2)])
def test_one_pass_is_complete_and_in_order_for_any_workers(damaged, workers, threads):
    flags.FLAGS.mark_as_parsed()
    spec = spec_of(damaged, shuffle=False, workers=workers, threads=threads)
    batches = list(data.evaluation_iterator(spec, batch_size=8))
    assert [len(batch["image"]) for batch in batches] == [8, 8, 8]
    places = np.arange(24)
    np.testing.assert_array_equal(
        np.concatenate([batch["mask"] for batch in batches]),
        (places < COUNT) & ~np.isin(places, (3, 11)),
    )
    seen = np.concatenate([np.array(numbers(batch))[batch["mask"]] for batch in batches])
    good = [number for number in range(COUNT) if number not in (3, 11)]
    assert seen.tolist() == good
    epoch = data.make_iterator(spec, batch_size=16, seed=0, repeat=False)
    assert [numbers(batch) for batch in epoch] == [good[:16]]  # the last two fill no batch


@pytest.fixture
def lines(monkeypatch):
    """The warnings of a test."""
    lines = []
    monkeypatch.setattr(absl_logging, "warning", lambda text, *values: lines.append(text % values))
    return lines


def test_an_undecodable_image_is_left_out_and_named(damaged, lines):
    epoch = stream(damaged, 1, batch_size=COUNT - 2)
    assert sorted(epoch) == sorted(set(range(COUNT)) - {3, 11})
    assert any("03.png" in line for line in lines) and any("11.png" in line for line in lines)


def test_too_many_undecodable_images_are_an_error(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.jpg").write_bytes(b"not an image")
    with pytest.raises(data.DataError, match=r"^11 of 11 records .*\.jpg"):
        stream(tmp_path, 1, threads=0)
    within = transforms.BadRecords()
    for i in range(3000):  # one in a hundred is as many as may be
        within.add(ValueError("cut short") if i % 100 == 99 else None, f"file {i}")
    with pytest.raises(data.DataError, match="31 of 3001 records"):
        within.add(ValueError("cut short"), "the last straw")


def test_a_bad_image_counts_once_however_often_it_comes(tmp_path, numbered, lines):
    for path in numbered.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "text.png").write_bytes(b"not an image")
    epochs = stream(tmp_path, 30, batch_size=COUNT)
    assert epochs.count(0) == 30 and len(epochs) == 30 * COUNT
    assert lines == [
        f"skipped {tmp_path}/text.png: not a known kind of image ({lines[0].split('(')[1]}"
    ]


@pytest.mark.parametrize("shares", [1, 2])
def test_a_few_images_that_are_all_bad_end_the_run(tmp_path, shares):
    """The pipeline does not wait forever for a good image."""
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(b"not an image")
    with pytest.raises(data.DataError, match="records cannot be decoded"):
        stream(tmp_path, 1, index=0, count=shares, shuffle=False)
    with pytest.raises(data.DataError, match="4 of 4 records cannot be decoded"):
        list(data.evaluation_iterator(spec_of(tmp_path), batch_size=3))


def test_half_of_the_images_are_flipped_depending_on_their_place(tmp_path):
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[:, 0] = 200
    Image.fromarray(picture).save(tmp_path / "one.png")

    def draw(**changes):
        spec = spec_of(tmp_path, flip=True, **changes)
        iterator = data.make_iterator(spec, batch_size=1, seed=3)
        return np.concatenate([next(iterator)["image"] for _ in range(400)])

    images = draw()
    flipped = images[:, 0, 3, 0] == 200
    np.testing.assert_array_equal(
        images[flipped], np.tile(picture[:, ::-1], (flipped.sum(), 1, 1, 1))
    )
    np.testing.assert_array_equal(images[~flipped], np.tile(picture, ((~flipped).sum(), 1, 1, 1)))
    assert abs(flipped.mean() - 0.5) < 0.1  # four standard deviations
    np.testing.assert_array_equal(draw(threads=0), images)


RED, CLEAR = (200, 10, 20, 255), (200, 10, 20, 0)
GREY16 = Image.fromarray(np.full((4, 4), 100 * 256, np.uint16))
PALETTE = Image.new("RGBA", (4, 4), CLEAR).quantize(4)


@pytest.mark.parametrize(
    ("image", "kind", "pixel"),
    [
        (Image.new("RGB", (4, 4), RED[:3]), "PNG", RED[:3]),
        (Image.new("L", (4, 4), 77), "PNG", (77, 77, 77)),
        (Image.new("1", (4, 4), 1), "PNG", (255, 255, 255)),
        (Image.new("LA", (4, 4), (0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (4, 4), RED), "PNG", RED[:3]),
        (Image.new("RGBA", (4, 4), CLEAR), "WEBP", (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 51)), "PNG", (204, 204, 204)),
        (PALETTE, "PNG", (255, 255, 255)),
        (GREY16, "PNG", (100, 100, 100)),
        (Image.new("L", (4, 4), 77), "JPEG", (77, 77, 77)),
        (Image.new("CMYK", (4, 4), (0, 0, 0, 55)), "JPEG", (200, 200, 200)),
    ],
)
def test_every_kind_of_image_becomes_rgb_on_white(image, kind, pixel):
    pixels = np.asarray(transforms.decode(file_bytes(image, kind)))
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.uint8(pixel), (4, 4, 3)))


@pytest.mark.parametrize(
    ("width", "height", "size", "kernel"),
    [
        (96, 64, 32, Image.Resampling.BOX),
        (64, 96, 24, Image.Resampling.LANCZOS),
        (48, 32, 48, Image.Resampling.LANCZOS),
    ],
)
def test_square_is_the_middle_of_the_resized_image(width, height, size, kernel):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(noise)
    scale = size / min(width, height)
    whole = image.resize((round(width * scale), round(height * scale)), kernel)
    left, top = (whole.width - size) // 2, (whole.height - size) // 2
    expected = np.asarray(whole.crop((left, top, left + size, top + size)))
    result = transforms.cropped(image, size)
    assert np.abs(result.astype(int) - expected).max() <= 1  # the rounding of Pillow's two passes


def test_crops_move_along_the_longer_side():
    ramp = Image.fromarray(np.tile(np.arange(40, dtype=np.uint8)[:, None, None], (1, 8, 3)))
    first, middle, last = (
        transforms.cropped(ramp, 8, offset)[0, 0, 0] for offset in (0.0, 0.5, 1.0)
    )
    assert (first, middle, last) == (0, 16, 32)
    example = transforms.ToExample(size=8, crop="random")
    record = {"image": file_bytes(ramp), "name": "ramp"}
    tops = [example(record, np.random.default_rng(i))["image"][0, 0, 0] for i in range(200)]
    assert min(tops) <= 2 and max(tops) >= 30 and abs(np.mean(tops) - 16) < 3


def test_a_jpeg_decoded_at_reduced_scale_looks_the_same():
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    image = Image.fromarray(coarse).resize((480, 360), Image.Resampling.BICUBIC)
    content = file_bytes(image, "JPEG", quality=95)
    reduced = transforms.decode(content, 64)
    assert reduced.size == (120, 90)
    whole = transforms.cropped(transforms.decode(content), 32).astype(int)
    assert np.abs(transforms.cropped(reduced, 32) - whole).mean() < 1.5


def test_one_of_several_captions_is_drawn():
    image = file_bytes(Image.new("L", (4, 4)))
    features = {"image": image, "captions": {"id": [1, 2], "text": [b"a", b"b"]}}  # as in COCO
    source = TfdsSource(
        records=[features], title="it", label=None, class_names=None, keep={"caption": "captions"}
    )
    example = transforms.ToExample(size=4)
    drawn = [example(source[0], np.random.default_rng(i))["caption"] for i in range(100)]
    assert set(drawn) == {"a", "b"} and 30 < drawn.count("a") < 70


def test_an_evaluation_sees_everything_once(damaged):
    seen = []
    for index in range(3):
        batches = list(
            data.evaluation_iterator(
                spec_of(damaged), batch_size=2, process_index=index, process_count=3
            )
        )
        assert [batch["image"].shape for batch in batches] == [(2, 4, 4, 3)] * 4
        seen += [n for b in batches for n, ok in zip(numbers(b), b["mask"], strict=True) if ok]
    assert sorted(seen) == sorted(set(range(COUNT)) - {3, 11})


def test_subfolders_are_classes_and_splits(tmp_path, monkeypatch):
    for number, path in enumerate(["train/dog/x/1.PNG", "train/cat/2.png", "val/dog/3.png"]):
        (tmp_path / path).parent.mkdir(parents=True)
        Image.new("L", (4, 4), 10 + number).save(tmp_path / path)
    (tmp_path / "train/dog/._1.png").write_bytes(b"a file manager's litter")
    source = data.open_data(spec_of(tmp_path))
    assert len(source) == 2 and source.class_names == ("cat", "dog")
    monkeypatch.chdir(tmp_path.parent)  # a folder that lies here is a folder, and no TFDS name
    assert data.open_data(spec_of(tmp_path.name)).files == source.files
    batch = next(data.make_iterator(spec_of(tmp_path), batch_size=2, seed=0))
    assert batch["label"].dtype == np.int32
    assert dict(zip(numbers(batch), batch["label"], strict=True)) == {0: 1, 1: 0}
    other = spec_of(tmp_path, split="val")
    assert data.num_examples(other) == 1
    assert next(data.make_iterator(other, batch_size=1, seed=0))["label"] == [1]  # as in train
    (tmp_path / "val/dog").rename(tmp_path / "val/cow")
    with pytest.raises(data.DataError, match=r"class 'cow' is not among those of .*train"):
        data.num_examples(other)
    with pytest.raises(data.DataError, match="no subfolder 'test'"):
        data.num_examples(spec_of(tmp_path, split="test"))


def test_missing_data_are_reported_with_their_place(tmp_path):
    def message(**fields):
        with pytest.raises(data.DataError) as caught:
            data.num_examples(data.DataSpec(data_dir=str(tmp_path), **fields))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    by_hand = message(name="celeb_a_hq/256")
    assert f"{tmp_path}/downloads/manual" in by_hand and "data1024x1024.tar" in by_hand
    command = f"python -m conprediff_jax.prepare --name=cifar10 --data_dir={tmp_path}"
    assert command in message(name="cifar10")
    assert "no such folder" in message(name=str(tmp_path / "absent"))
    assert "no images" in message(name=str(tmp_path))
    assert "leading ./" in message(name="celebs")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name is empty"),
        ({"crop": "middle"}, r"crop is 'middle'; choose from \['center', 'random'\]"),
        ({"image_size": 0}, "image_size is 0; it must be at least 1"),
        ({"threads": -1}, "threads is -1"),
        ({"keep": "caption"}, "list of feature names"),
        ({"class_names": "cat"}, "class_names is the text 'cat'; it must be a list of class names"),
        ({"text": ""}, "text is empty; it must name a feature"),
    ],
)
def test_a_wrong_spec_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        data.DataSpec(**{"name": "cifar10", **changes})


def test_check_batch_names_what_does_not_fit(numbered):
    spec = spec_of(numbered)
    good = {"image": np.full((2, 4, 4, 3), 9, np.uint8), "label": np.int32([0, 4])}
    data.check_batch(good, spec, batch_size=2, num_classes=5)
    for changes, message in [
        ({"image": good["image"][:1]}, "shape"),
        ({"image": good["image"].astype(np.float32)}, "dtype float32"),
        ({"image": good["image"] // 9}, "0 to 255"),
        ({"label": np.int32([0, 5])}, "labels run from 0 to 5; the model expects 0 to 4"),
    ]:
        with pytest.raises(data.DataError, match=message):
            data.check_batch({**good, **changes}, spec, batch_size=2, num_classes=5)
    with pytest.raises(data.DataError, match="no labels"):
        data.check_batch({"image": good["image"]}, spec, batch_size=2, num_classes=5)
    with pytest.raises(data.DataError, match="do not fill a batch"):
        data.make_iterator(spec, batch_size=COUNT, seed=0, process_count=2, repeat=False)


def test_importing_the_package_loads_no_tensorflow():
    program = "import sys, conprediff_jax.data; print('tensorflow' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
