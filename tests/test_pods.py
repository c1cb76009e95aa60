"""Tests of drawing and measuring in several real processes: the same as in one, and kills."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from test_commands import ROOT, environment
from test_processes import Launched

from conprediff_jax import data
from conprediff_jax.metrics import image_sets
from conprediff_jax.parallel import share

TRAINED = {"train.steps": 2, "train.eval_every": 2}
SAMPLED = ["--num=60", "--batch_size=1", "--sampler=ddpm", "--steps=20"]
FILLED = ["--samples=2", "--batch_size=2", "--sampler=ddim", "--steps=3"]


def commands(images, run, out):
    config = {"data.name": images, **TRAINED}
    config = [f"--config.{key}={value}" for key, value in config.items()]
    measured = [f"--cache={out / 'cache'}", "--bootstrap=5"]
    return [
        ["main", f"--config={ROOT / 'tests' / 'tiny.py'}", f"--workdir={out / 'run'}", *config],
        ["sample", f"--workdir={run}", *SAMPLED, f"--out={out / 'samples.npz'}", "--first=5"],
        ["evaluate", f"--workdir={run}", f"--reference={images}", "--num=14", "--batch_size=3",
         "--allow_few", *measured, f"--out={out / 'evaluation'}"],
        ["inpaint", f"--workdir={run}", f"--images={images}", "--masks=box", "--num=3", *FILLED,
         f"--out={out / 'filled'}"],
        ["evaluate_inpainting", f"--workdir={run}", f"--images={images}", "--masks=half,box",
         "--num=3", *FILLED, *measured, f"--out={out / 'inpainting'}"],
        ["held_out", f"--workdir={run}", "--split=train", "--num=17", "--times=3",
         "--batch_size=3", f"--out={out / 'held_out.json'}"],
    ]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tiny.write_images(tmp_path_factory.mktemp("data") / "images")
    (folder / "004.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory):
    """What one process makes."""
    out = tmp_path_factory.mktemp("alone")
    run_all(images, out / "run", out, 1)
    return out


def run_all(images, run, out, count):
    """Runs all commands; training, which other tests run in several processes, in one alone."""
    lines = commands(images, run, out)[0 if count == 1 else 1 :]
    (out / "commands.json").write_text(json.dumps([list(map(str, line)) for line in lines]))
    launcher = ["launch/local.py", f"--processes={count}", "--devices=1", "--"]
    command = [sys.executable, ROOT / "tests" / "several_commands.py", out / "commands.json"]
    ended = subprocess.run(
        [sys.executable, *launcher, *map(str, command)],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, timeout=500,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout


def rows(path):
    """What each row of a table depends on, and its numbers; without where the model lies."""
    found = []
    for row in json.loads(path.read_text()):
        settings = {key: value for key, value in row["settings"].items() if key != "workdir"}
        found.append((settings, jax.tree.leaves([row["metrics"], row.get("losses")])))
    return found


def test_processes_draw_and_measure_together_as_one_does(images, alone, tmp_path):
    run_all(images, alone / "run", tmp_path, 4)
    drawn = [np.load(out / "samples.npz")["arr_0"] for out in (alone, tmp_path)]
    assert drawn[0].shape == (60, 8, 8, 3)
    np.testing.assert_array_equal(*drawn)
    kinds = ("filled/*.png", "inpainting/*.png", "evaluation/samples/*/*.npz")
    pictures = sorted(path.relative_to(alone) for kind in kinds for path in alone.glob(kind))
    assert len(pictures) == 3 * 2 + 1 + 2 + 14
    for path in pictures:
        assert (tmp_path / path).read_bytes() == (alone / path).read_bytes(), path
    for table in ("evaluation/metrics.json", "inpainting/inpainting.json", "held_out.json"):
        found, expected = rows(tmp_path / table), rows(alone / table)
        assert [settings for settings, _ in found] == [settings for settings, _ in expected]
        for (_, figures), (_, wanted) in zip(found, expected, strict=True):
            assert len(wanted) > 1
            assert figures == pytest.approx(wanted, rel=1e-4, abs=1e-6), table
    assert not list(tmp_path.rglob(".*"))


def test_a_process_that_is_killed_is_named_and_what_was_drawn_is_kept(alone, tmp_path):
    out = tmp_path / "drawn"
    drawn = Launched(
        "sample", f"--workdir={alone / 'run'}", *SAMPLED, "--first=5", f"--out={out}", restarts=1
    )
    victim = drawn.pids()[1]
    while len(there := list(out.glob("*.png"))) < 3:
        assert drawn.launcher.poll() is None
        time.sleep(0.005)
    os.kill(victim, signal.SIGKILL)
    written = {path: path.stat().st_mtime_ns for path in there}
    drawn.until(f"process 1 ({victim}) was killed by SIGKILL")
    assert int(drawn.until("goes on").split(" of 60")[0].split()[-1]) >= len(there)
    drawn.finished()
    assert {path: path.stat().st_mtime_ns for path in there} == written
    found = np.stack([Image.open(out / f"{5 + index:06}.png") for index in range(60)])
    np.testing.assert_array_equal(found, np.load(alone / "samples.npz")["arr_0"])


def test_processes_read_every_image_of_a_set_once(images, tmp_path, monkeypatch):
    """Of a folder, an npz, several npz and a data set, in which one image cannot be decoded."""
    pixels = np.random.default_rng(0).integers(0, 256, (23, 8, 8, 3), np.uint8)
    whole = tmp_path / "folder"
    whole.mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(whole / f"{index}.png")
    np.savez(tmp_path / "all.npz", pixels)
    for first in range(0, 23, 4):
        np.savez(tmp_path / f"{first}.npz", pixels[first : first + 4])
    parts = [tmp_path / f"{first}.npz" for first in range(0, 23, 4)]
    spec = data.DataSpec(name=str(images), image_size=8)
    for found in (
        image_sets.read_samples(whole),
        image_sets.read_samples(tmp_path / "all.npz"),
        image_sets.from_arrays("parts", parts),
        image_sets.from_data(spec),
    ):
        expected = list(found.batches(5))
        assert sum(map(len, expected)) == 23
        for count in (2, 3, 7):
            dealt = [list(found.batches(5, index, count)) for index in range(count)]
            monkeypatch.setattr(share, "of_all", lambda _, dealt=dealt: dealt)
            together = share.in_turn([])
            assert len(together) == len(expected)
            for one, other in zip(together, expected, strict=True):
                np.testing.assert_array_equal(one, other)
