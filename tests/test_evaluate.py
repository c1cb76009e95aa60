"""Tests of the evaluation command: what it reads, and what it refuses."""

import dataclasses
import json
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny
from disk import little_room
from PIL import Image
from quick import environment

from conprediff_jax import data, parallel
from conprediff_jax.cli import sweep_flag
from conprediff_jax.common.errors import FieldError, UserError
from conprediff_jax.metrics import features, frechet, image_sets, small, suite
from conprediff_jax.sampling import record
from conprediff_jax.sampling.shards import generate_to
from conprediff_jax.sampling.spec import GaussianSampling, RePaintSampling
from conprediff_jax.train.loop import train

ROOT = pathlib.Path(__file__).parent.parent


def evaluate(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "conprediff_jax.evaluate", *map(str, arguments)],
        cwd=ROOT,
        env=environment(XLA_FLAGS=""),
        capture_output=True,
        text=True,
    )


def pictures(count, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def write_folder(folder, images):
    folder.mkdir(parents=True)
    for index, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{index:03}.png")
    return folder


def joined(image_set, batch_size=3):
    return np.concatenate(list(image_set.batches(batch_size)))


@pytest.fixture(scope="module")
def mesh():
    return parallel.make_mesh(parallel.MeshSpec())


def mean_extractor():
    """A simple feature network: the mean colour."""
    return features.Extractor(
        name="mean colour",
        fingerprint="mean",
        apply=lambda params, x: {"pool": x.mean(axis=(1, 2)) * params},
        params=np.float32(1),
        labels={"frechet": "FD", "kernel": "KD", "precision": "precision", "recall": "recall"},
    )


# The command --------------------------------------------------------------------------------------


def test_a_workdir_is_evaluated_and_reported(tmp_path):
    config = tiny.get_config()
    config.data.name = str(tiny.write_images(tmp_path / "data", 24))
    config.train.update(steps=1, checkpoint_every=1)
    train(config, str(tmp_path / "run"))
    arguments = [f"--reference={tmp_path / 'data'}", f"--cache={tmp_path / 'cache'}"]
    arguments += [f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", "--num=12"]
    refused = evaluate(*arguments, "--num=2048")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("error: 24 reference images: a Frechet")
    assert not (tmp_path / "out").exists()  # before anything is drawn

    done = evaluate(*arguments, "--allow_few", "--batch_size=8", "--bootstrap=5")
    assert done.returncode == 0, done.stderr
    names = [f"{m}-random-VGG16" for m in ("FD", "KD", "precision", "recall")]
    (found,) = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(found["metrics"]) == names
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        assert line.split()[0] == name
        assert found["metrics"][name]["low"] <= found["metrics"][name]["high"]
    assert "12/12 images" in done.stderr
    assert re.search(r"features of .*: 24/24 images", done.stderr)
    report = pathlib.Path(found["report"])
    assert (report / "report.html").read_text().count("data:image/png;base64") == 3
    for name in ("samples", "neighbors", "precision_recall"):
        assert (report / f"{name}.png").exists()
    settings = found["settings"]
    assert (settings["step"], settings["num"], settings["seed"]) == (1, 12, 0)
    assert settings["reference"]["name"] == str(tmp_path / "data")
    assert settings["reference"]["count"] == 24 and settings["version"].startswith("0.")

    # The other reference has 8 images, of which one cannot be decoded: one k of five has a place.
    few = write_folder(tmp_path / "few", pictures(4, seed=2))
    (few / "001.png").write_bytes(b"no image")
    other = f"--reference={few}"
    done = evaluate(*arguments, other, "--allow_few", "--batch_size=8", "--bootstrap=5")
    assert done.returncode == 0, done.stderr
    assert "3 reference images: recall needs at least 4" in done.stderr
    new, old = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert old == found and list(new["metrics"]) == names[:2]
    assert list(new["missing"]) == names[2:]
    assert "12/12 images" not in done.stderr.replace("features of", "")  # drawn once
    swept = evaluate(*arguments, other, "--allow_few", "--bootstrap=0", "--sweep=steps=2,3")
    assert swept.returncode == 0, swept.stderr
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [row["settings"]["sampling"]["steps"] for row in rows] == [3, 2, 3, 3]
    for line, row in zip(swept.stdout.splitlines()[-2:], rows[1::-1], strict=True):
        steps, value = row["settings"]["sampling"]["steps"], row["metrics"][names[0]]["value"]
        assert line.startswith(f"steps {steps}:   {names[0]} {value:.4g}")
    [picture] = (tmp_path / "out" / "sweeps").glob("*.png")
    assert Image.open(picture).size[0] > 400
    compared = f"--compare={shutil.copytree(tmp_path / 'run', tmp_path / 'twin')}"
    done = evaluate(*arguments, other, "--allow_few", "--bootstrap=0", compared)
    assert done.returncode == 0, done.stderr
    [page] = (tmp_path / "out" / "comparisons").glob("run_twin_*.html")
    page = page.read_text()
    assert page.count("data:image/png;base64") == 3 and str(tmp_path / "twin") in page
    assert re.search(f"<td>{names[0]}</td><td>(.*?)</td><td>\\1</td>", page)  # one model, twice
    view = (tmp_path / "out" / "metrics.md").read_text().splitlines()
    assert len(view[2].split("|")) == len(view[0].split("|")) and "reference.count" in view[0]


def test_samples_are_held_against_a_statistics_file_only_with_its_network(tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "samples.npz", pictures(4))
    result = evaluate(
        f"--samples={tmp_path / 'samples.npz'}", f"--reference={tmp_path / 'stats.npz'}",
        "--allow_few", f"--cache={tmp_path}", f"--out={tmp_path / 'out'}",
    )  # fmt: skip
    assert result.returncode == 2
    assert "give images, or --inception" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("guidnce=1,2", "has 'guidnce=1,2': did you mean 'guidance'"),
        ("steps=1.5", "has 'steps=1.5': give whole numbers after the key"),
        ("guidance", "has 'guidance': give numbers after the key"),
        ("steps=1 steps=2", "has the key 'steps' twice"),
    ],
)
def test_a_sweep_that_cannot_be_read_is_refused(text, said):
    with pytest.raises(FieldError, match=f"sweep {said}"):
        sweep_flag.parse(text)


def test_a_sweep_is_every_combination_in_order():
    found = sweep_flag.parse("guidance=1,2,1 steps=5,10")
    assert found == [
        {"guidance": 1.0, "steps": 5},
        {"guidance": 1.0, "steps": 10},
        {"guidance": 2.0, "steps": 5},
        {"guidance": 2.0, "steps": 10},
    ]


# Reading ------------------------------------------------------------------------------------------


def test_folders_npz_shards_and_data_sets_are_the_same_images(tmp_path):
    images = pictures(7)
    folder = write_folder(tmp_path / "folder", images)
    np.savez(tmp_path / "all.npz", images)
    np.savez(tmp_path / "a.npz", images[:4])
    np.savez(tmp_path / "b.npz", images[4:])
    spec = data.DataSpec(name=str(folder), image_size=8)
    for found in (
        image_sets.read_samples(folder),
        image_sets.read_samples(tmp_path / "all.npz"),
        image_sets.from_arrays("shards", [tmp_path / "a.npz", tmp_path / "b.npz"]),
        image_sets.from_data(spec),
    ):
        np.testing.assert_array_equal(joined(found), images)
        assert (found.count, found.size) == (7, (8, 8))
        np.testing.assert_array_equal(found.pick([5, 0, 5]), images[[5, 0, 5]])
        assert [len(batch) for batch in found.batches(3)] == [3, 3, 1]


def test_adm_batches_give_both_statistics_and_their_images(tmp_path):
    moments = {"mu": np.ones(3), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}
    np.savez(tmp_path / "adm.npz", pictures(5), **moments)
    found = image_sets.read_reference(str(tmp_path / "adm.npz"), size=(8, 8))
    np.testing.assert_array_equal(found.gaussians["pool"].mean, moments["mu"])
    np.testing.assert_array_equal(found.gaussians["spatial"].covariance, moments["sigma_s"])
    assert found.count == 5 and len(joined(found)) == 5


@pytest.mark.parametrize(
    "names",
    [
        [f"{number}" for number in range(1, 13)],
        ["a/1", "a-b/1", "a/2", "a-b/2", "b", "a"],
        [f"img_{number}" for number in (1, 2, 9, 10, 11, 100)],
    ],
    ids=["numbers", "folders", "words"],
)
def test_samples_and_reference_are_paired_by_name_whatever_the_endings(names, tmp_path):
    """Every picture says its place in `names`, and comes from both readers at one place."""
    for side, ending in (("samples", "png"), ("reference", "bmp")):
        for index, name in enumerate(names):
            (tmp_path / side / name).parent.mkdir(parents=True, exist_ok=True)
            picture = Image.new("RGB", (8, 8), (index, 0, 0))
            picture.save(tmp_path / side / f"{name}.{ending}")
    samples = image_sets.read_samples(tmp_path / "samples")
    reference = image_sets.read_reference(str(tmp_path / "reference"), size=(8, 8), strict=True)
    image_sets.check_partners(samples.names, reference.names, reference.name)
    places = joined(samples)[:, 0, 0, 0]
    np.testing.assert_array_equal(places, joined(reference)[:, 0, 0, 0])
    assert [names[place] + ".png" for place in places] == list(samples.names)
    if "a" not in names:  # written in the order that people mean
        np.testing.assert_array_equal(places, range(len(names)))


@pytest.mark.parametrize(
    ("samples", "reference", "message"),
    [
        (["1.png", "2.png", "10.png"], ["1.png", "3.png", "10.png"], "2 stands where .* has 3"),
        (["1.png", "2.png"], ["1.png"], "2 stands where .* has no more images"),
        (["1.png"], ["1.png", "a/2.png"], "no more samples stands where .* has a/2"),
        (["1.bmp", "1.png"], ["1.jpg", "1.png"], "2 samples are called 1"),
    ],
)
def test_the_first_difference_of_sets_that_do_not_match_is_named(samples, reference, message):
    with pytest.raises(UserError, match=f"^images are compared by their names: {message}"):
        image_sets.check_partners(samples, reference, "the other")


def test_partners_may_be_without_names_and_composed_differently():
    image_sets.check_partners(None, ["1.png"], "")
    image_sets.check_partners(["1.png"], None, "")
    image_sets.check_partners(["\u00e9.png"], ["e\u0301.webp"], "")


def test_a_reference_image_that_cannot_be_decoded_is_named_where_it_has_a_partner(tmp_path):
    folder = write_folder(tmp_path / "reference", pictures(12))
    (folder / "007.png").write_bytes(b"no image")
    (left_out, whole) = (
        image_sets.read_reference(str(folder), size=(8, 8), strict=strict)
        for strict in (False, True)
    )
    assert len(joined(left_out)) == 11
    with pytest.raises(UserError, match=r"reference: 007\.png cannot be decoded"):
        joined(whole, batch_size=5)


def test_samples_are_turned_as_their_reference_is(tmp_path):
    pixels = pictures(1, 8)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # its first row is the right side
    (tmp_path / "turned").mkdir()
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "turned" / "a.png", exif=exif)
    samples = image_sets.read_samples(tmp_path / "turned")
    reference = image_sets.read_reference(str(tmp_path / "turned"), size=(8, 8))
    np.testing.assert_array_equal(joined(samples), pixels[None])
    np.testing.assert_array_equal(joined(reference), pixels[None])


def bad_folder(images):
    return lambda path: write_folder(path, images)


def bad_npz(**arrays):
    def write(path):
        np.savez(path.with_suffix(".npz"), **arrays)
        return path.with_suffix(".npz")

    return write


def bad_bytes(name, content):
    def write(path):
        path.mkdir()
        (path / name).write_bytes(content)
        return path

    return write


def huge_png():
    """The head of a PNG of 60,000 x 60,000 pixels, which Pillow refuses to decode."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0), b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )


def single_array(path):
    np.save(path.with_suffix(".npy"), pictures(2))
    return path.with_suffix(".npy")


def text_file(path):
    path.with_suffix(".npz").write_text("no npz")
    return path.with_suffix(".npz")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "no such folder or npz"),
        (bad_folder([]), "no images there"),
        (
            bad_folder([*pictures(1), *pictures(1, 9)]),
            "9 x 9 pixels, but 000.png has 8 x 8",
        ),
        (bad_folder([*pictures(1), pictures(1)[0, ..., 0]]), r"001.png: a grey image"),
        (bad_folder([np.zeros((8, 8, 4), np.uint8)]), "000.png: an image of mode RGBA"),
        (bad_npz(images=pictures(2)), "holds images; expected arr_0"),
        (bad_npz(arr_0=pictures(2)[..., 0]), r"arr_0 is uint8 of shape \(2, 8, 8\); expected RGB"),
        (bad_npz(arr_0=pictures(2) / 255), "arr_0 is float64"),
        (bad_npz(mu=np.zeros(2), sigma=np.eye(2)), "holds statistics; samples must be images"),
        (bad_bytes("a.png", huge_png()), r"a\.png: not a readable image: Image size \(36"),
        (bad_bytes("a.png", b""), r"a\.png: not a readable image: the file is empty"),
        (single_array, r"samples\.npy: not a readable file of arrays: File is not a zip file"),
        (text_file, "not a readable file of arrays"),
    ],
)
def test_bad_samples_are_named_in_a_line(make, message, tmp_path):
    path = make(tmp_path / "samples")
    with pytest.raises(UserError, match=message) as error:
        image_sets.read_samples(path)
    assert "\n" not in str(error.value)


# Features and figures -----------------------------------------------------------------------------


def test_features_are_cached_by_content_and_padding_leaves_no_trace(tmp_path, mesh, monkeypatch):
    images = pictures(13)
    np.savez(tmp_path / "a.npz", images)
    first = image_sets.read_samples(tmp_path / "a.npz")
    runner = features.Runner(mean_extractor(), mesh, batch_size=3)
    assert runner.batch_size == 8  # divided over the suite's eight devices
    moments = features.extract(runner, first, tmp_path / "cache")
    assert not moments.rows
    whole = features.extract(runner, first, tmp_path / "cache", {"pool"})
    means = images.mean(axis=(1, 2))
    np.testing.assert_allclose(whole.rows["pool"], means, rtol=1e-6)
    for found in (moments, whole):
        np.testing.assert_allclose(found.gaussians["pool"].mean, means.mean(0), rtol=1e-6)
        np.testing.assert_allclose(found.gaussians["pool"].covariance, np.cov(means.T), rtol=1e-4)
    (tmp_path / "a.npz").rename(tmp_path / "b.npz")
    monkeypatch.setattr(features, "_compute", None)  # the same content is not computed again
    again = features.extract(
        runner, image_sets.read_samples(tmp_path / "b.npz"), tmp_path / "cache"
    )
    np.testing.assert_array_equal(again.rows["pool"], whole.rows["pool"])


def random_set(count):
    """Images in memory."""
    images = pictures(count, 2)
    return image_sets.ImageSet(
        name="random",
        fingerprint="random",
        count=count,
        size=(2, 2),
        batches=lambda size, *_: (images[i : i + size] for i in range(0, count, size)),
    )


def test_features_without_room_leave_nothing_and_are_computed_when_there_is_some(tmp_path, mesh):
    runner, images = features.Runner(mean_extractor(), mesh, batch_size=64), random_set(1000)
    runner(pictures(64, 2))  # compiled while there is room
    with little_room(), pytest.raises(UserError, match=r"^cannot write .*pool\.npy: [^\n]+$"):
        features.extract(runner, images, tmp_path, {"pool"})
    assert [list(folder.iterdir()) for folder in tmp_path.iterdir()] == [[]]
    found = features.extract(runner, images, tmp_path, {"pool"})
    expected = np.concatenate(list(images.batches(64))).mean(axis=(1, 2))
    np.testing.assert_allclose(found.rows["pool"], expected, rtol=1e-6)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^cannot write .*/file/random-mean: [^\n]+$"):
        features.extract(runner, images, tmp_path / "file")


def test_runs_that_share_a_cache_may_compute_the_same_at_the_same_time(tmp_path, mesh):
    runner, images = features.Runner(mean_extractor(), mesh, batch_size=8), random_set(20)
    start = threading.Barrier(4)

    def extract(keep):
        start.wait()
        return features.extract(runner, images, tmp_path, keep)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(extract, [set(), {"pool"}, set(), {"pool"}]))
    means = pictures(20, 2).mean(axis=(1, 2))
    for one in found:
        np.testing.assert_allclose(one.gaussians["pool"].covariance, np.cov(means.T), rtol=1e-4)
    for one in found[1::2]:
        np.testing.assert_allclose(one.rows["pool"], means, rtol=1e-6)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "pool.npz").write_bytes(b""), r"pool\.npz: not a readable file"),
        (lambda folder: (folder / "pool.npy").write_bytes(b"x"), r"pool\.npy: not a readable file"),
        (lambda folder: np.save(folder / "pool.npy", np.ones((3, 3))), "3 rows.* moments are of 9"),
    ],
)
def test_a_damaged_cache_is_named(damage, message, tmp_path, mesh):
    runner, images = features.Runner(mean_extractor(), mesh, batch_size=8), random_set(9)
    features.extract(runner, images, tmp_path, {"pool"})
    damage(tmp_path / "random-mean")
    with pytest.raises(UserError, match=message):
        features.extract(runner, images, tmp_path, {"pool"})


def test_features_that_are_no_numbers_are_refused(tmp_path, mesh):
    broken = dataclasses.replace(mean_extractor(), params=np.float32(np.nan))
    runner = features.Runner(broken, mesh, batch_size=8)
    with pytest.raises(UserError, match=r"^random: some features are no finite numbers$"):
        features.extract(runner, random_set(9), tmp_path)
    assert list(tmp_path.rglob("*.*")) == []


def test_statistics_are_held_against_their_network_before_anything_is_computed(tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(5), sigma=np.eye(5))
    found = image_sets.read_reference(str(tmp_path / "stats.npz"), size=(8, 8))
    with pytest.raises(UserError, match="statistics of Inception features, and mean colour has"):
        features.check_statistics(found, mean_extractor())
    inception = dataclasses.replace(mean_extractor(), labels={"spatial": "sFID"})
    with pytest.raises(UserError, match="statistics of 5 pool features, but mean colour has 3"):
        features.check_statistics(found, inception)


def test_the_suite_computes_what_is_possible_and_refuses_too_few(tmp_path, mesh):
    runner = features.Runner(mean_extractor(), mesh)
    sets = {}
    for name, seed in (("samples", 0), ("reference", 1)):
        np.savez(tmp_path / f"{name}.npz", pictures(60, seed=seed))
        found = image_sets.read_samples(tmp_path / f"{name}.npz")
        sets[name] = features.extract(runner, found, tmp_path / "cache", {"pool"})
    wanted = suite.Suite(metrics=["frechet", "kernel", "precision", "recall"], replicates=30)
    results = wanted.compute(sets["samples"], sets["reference"], runner.extractor.labels)
    expected = frechet.frechet_distance(*(found.gaussians["pool"] for found in sets.values()))
    assert results.figures["FD"].value == pytest.approx(expected)
    for figure in results.figures.values():
        assert figure.low <= figure.value <= figure.high
    assert sorted(results.curve) == list(suite.CURVE)
    assert results.curve[3] == (results.figures["recall"].value, results.figures["precision"].value)
    recalls, precisions = zip(*results.curve.values(), strict=True)
    assert list(recalls) == sorted(recalls) and list(precisions) == sorted(precisions)
    with pytest.raises(UserError, match="60 samples: a Frechet distance of fewer than 2048"):
        wanted.check_counts(60, 5000)
    assert not suite.Suite(metrics=["frechet", "kernel"]).lacking(2, 0)
    assert not suite.Suite(metrics=["score"]).lacking(10, 1)
    for metric, counts, least in (
        ("frechet", (1, 5), "1 samples: frechet needs at least 2"),
        ("kernel", (5, 1), "1 reference images: kernel needs at least 2"),
        ("score", (9, 5), "9 samples: score needs at least 10"),
        ("recall", (60, 3), "3 reference images: recall needs at least 4"),
    ):
        assert suite.Suite(metrics=[metric]).lacking(*counts) == {metric: least}
    with pytest.raises(ValueError, match=r"metrics are .*fid.*: choose from"):
        suite.Suite(metrics=["fid"])


# Long generations ---------------------------------------------------------------------------------


def test_a_generation_broken_off_goes_on_and_ends_the_same(tmp_path):
    drawn = []

    def draw(indices):
        if drawn and indices[0] == 4 and len(drawn) == 2:
            drawn.append(None)
            raise KeyboardInterrupt
        drawn.append(indices)
        return np.stack([np.full((2, 2, 3), index, np.uint8) for index in indices])

    options = {"num": 10, "batch_size": 2, "settings": {"seed": 0}, "shard": 4}
    with pytest.raises(KeyboardInterrupt):
        generate_to(tmp_path / "samples", draw, **options)
    assert [file.name for file in tmp_path.glob("samples/*.npz")] == ["000000.npz"]
    files = generate_to(tmp_path / "samples", draw, **options)
    found = joined(image_sets.from_arrays("all", files))
    np.testing.assert_array_equal(found[:, 0, 0, 0], np.arange(10))
    assert len(drawn) == 1 + 2 + 3  # nothing was drawn twice
    with pytest.raises(UserError, match="holds images of"):
        generate_to(tmp_path / "samples", draw, **options | {"settings": {"seed": 1}})


def test_a_folder_holds_images_of_one_record(tmp_path):
    folder, settings = tmp_path / "images", {"seed": 0, "sampling": {"steps": 7}, "workdir": "a"}
    assert record.claim(folder, settings) == settings
    write_folder(folder / "more", pictures(2))
    moved = settings | {"workdir": "b", "version": "2"}
    assert record.claim(folder, moved) == settings  # the same images, and who drew them first
    other = settings | {"sampling": {"steps": 8}}
    with pytest.raises(UserError, match=r"images: holds images of sampling\.steps 7, not 8: name "):
        record.claim(folder, other)
    photos = write_folder(tmp_path / "photos", pictures(2))
    (folder / "link").symlink_to(photos)
    assert record.claim(folder, other, overwrite=True) == other
    assert [file.name for file in folder.rglob("*.*")] == ["settings.json"]
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"photos: holds images, and no settings\.json says"):
            record.claim(photos, settings, overwrite=overwrite)
    assert len(list(photos.iterdir())) == 2


def test_names_say_what_was_asked_for_and_differ_where_settings_do():
    model, usual = {"step": 60, "workdir": "a"}, GaussianSampling()
    names = [
        record.short_name(record.settings_of(model, spec, seed=0, **asked), usual, *asked)
        for spec, asked in (
            (usual, {}),
            (dataclasses.replace(usual, steps=7), {}),
            (dataclasses.replace(usual, guidance=2.0), {"label": 3}),
            (dataclasses.replace(usual, guidance_interval=(0.1, 0.9)), {}),
            (RePaintSampling(), {"masks": "thick"}),
            (usual, {"prompts": ["a red cat"]}),
            (usual, {"prompts": ["a red/cat"]}),
            (usual, {"prompts": ["a red cat", "a dog"]}),
            (usual, {"prompts": [60 * "x"]}),
        )
    ]
    assert len(set(names)) == len(names) and max(map(len, names)) < 100
    assert names[0] == "step_0000060_ddim_50_seed_0"
    assert names[2] == "step_0000060_ddim_50_guidance_2_seed_0_label_3"
    assert names[5] == "step_0000060_ddim_50_seed_0_a_red_cat"
    assert all(re.fullmatch(r"[A-Za-z0-9_.,-]+", name) for name in names)


def black(indices):
    return np.zeros((len(indices), 2, 2, 3), np.uint8)


def test_a_generation_without_room_leaves_nothing_and_goes_on_when_there_is_some(tmp_path):
    folder, options = tmp_path / "samples", {"num": 3, "batch_size": 3, "settings": {"seed": 0}}
    with little_room(10), pytest.raises(UserError, match=r"cannot write .*settings\.json: [^\n]+$"):
        generate_to(folder, black, **options)
    assert list(folder.iterdir()) == []
    with little_room(100), pytest.raises(UserError, match=r"cannot write .*000000\.npz: [^\n]+$"):
        generate_to(folder, black, **options)
    assert [file.name for file in folder.iterdir()] == ["settings.json"]
    assert image_sets.from_arrays("all", generate_to(folder, black, **options)).count == 3


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_folder_that_does_not_say_what_it_holds_is_refused_in_a_line(content, tmp_path):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(UserError, match=r"settings\.json: does not say what .*[^\n]$"):
        generate_to(tmp_path, black, num=1, batch_size=1, settings={})


def test_of_two_generations_into_one_new_folder_one_is_refused(tmp_path):
    start = threading.Barrier(2)

    def generate(seed):
        def draw(indices):
            return np.full((len(indices), 2, 2, 3), seed, np.uint8)

        start.wait()
        try:
            return generate_to(tmp_path / "new", draw, num=9, batch_size=3, settings={"seed": seed})
        except UserError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(generate, range(2)))
    (refused,) = (seed for seed in range(2) if isinstance(outcomes[seed], UserError))
    assert f"holds images of seed {1 - refused}, not {refused}" in str(outcomes[refused])
    assert (joined(image_sets.from_arrays("all", outcomes[1 - refused])) == 1 - refused).all()


# In the train loop --------------------------------------------------------------------------------


def test_small_evaluation_tells_good_samples_from_bad_and_compiles_once(tmp_path, mesh):
    smooth = np.linspace(0, 255, 16 * 8 * 8 * 3).reshape(16, 8, 8, 3).astype(np.uint8)
    folder = write_folder(tmp_path / "data", smooth)

    def draw(images, frozen):
        del frozen
        return images

    spec = data.DataSpec(name=str(folder), image_size=8)
    evaluation = small.SmallEvaluation(draw, mesh, spec, num=16, batch_size=8)
    good, bad = evaluation(smooth, None), evaluation(pictures(16), None)
    assert sorted(good) == ["eval/FD-random-VGG16", "eval/KD-random-VGG16"]
    assert good["eval/FD-random-VGG16"] == pytest.approx(0, abs=1e-4)
    assert all(good[name] < bad[name] for name in good)
    assert evaluation._runner._apply._cache_size() == 1
