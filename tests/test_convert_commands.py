"""Tests of commands that open an exported folder in the place of a workdir."""

import json
import pathlib
import subprocess
import sys

import convert_tiny
import numpy as np
import pytest
import tiny
from PIL import Image
from quick import environment

from conprediff_jax.interop import formats

ROOT = pathlib.Path(__file__).parent.parent


def run(module, *arguments):
    line = [sys.executable, "-m", f"conprediff_jax.{module}", *map(str, arguments)]
    result = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Images, and a model of such images as an inference folder."""
    folder = tmp_path_factory.mktemp("commands")
    images = tiny.write_images(folder / "images", 6)
    config = convert_tiny.pixels(steps=4).copy_and_resolve_references().unlock()
    config.data.name = str(images)
    model = convert_tiny.pretrained(config.lock())
    formats.write(model, "inference", str(folder / "model"))
    return images, folder / "model", model


def test_sample_and_inpaint(folders, tmp_path):
    images, folder, model = folders
    run("sample", f"--workdir={folder}", "--num=3", f"--out={tmp_path / 'images.npz'}")
    drawn = np.load(tmp_path / "images.npz")["arr_0"]
    assert np.abs(drawn.astype(int) - convert_tiny.draw(model, 3)).max() <= 1

    run(
        "inpaint", f"--workdir={folder}", "--split=train", "--num=2", "--samples=1",
        "--masks=half", "--sampler=ddim", "--steps=4", f"--out={tmp_path / 'filled'}",
    )  # fmt: skip
    about = json.loads((tmp_path / "filled" / "settings.json").read_text())
    assert about["step"] == 3 and len(about["filled share"]) == 2
    originals = [np.asarray(Image.open(path)) for path in sorted(images.iterdir())]
    for name in about["filled share"]:
        filled = np.asarray(Image.open(tmp_path / "filled" / f"{name}_0.png"))
        known = [(filled == original).all(-1).mean() for original in originals]
        assert max(known) >= 0.5  # the half that was kept, of the data that the config names


def test_evaluation_commands(folders, tmp_path):
    images, folder, _ = folders
    run(
        "evaluate", f"--workdir={folder}", f"--reference={images}", "--num=6", "--allow_few",
        "--metrics=frechet", "--bootstrap=0", f"--cache={tmp_path}", f"--out={tmp_path / 'judged'}",
        f"--guide={folder}@3", "--guidance=2",
    )  # fmt: skip
    found = json.loads((tmp_path / "judged" / "metrics.json").read_text())[0]
    assert found["settings"]["guide"].startswith(f"{folder}, step 3, average ")
    assert all(np.isfinite(figure["value"]) for figure in found["metrics"].values())

    run(
        "evaluate_inpainting", f"--workdir={folder}", f"--images={images}", "--num=2",
        "--samples=1", "--masks=half", "--sampler=ddim", "--steps=4", "--bootstrap=0",
        f"--out={tmp_path / 'fillings'}",
    )  # fmt: skip
    (row,) = json.loads((tmp_path / "fillings" / "inpainting.json").read_text())
    assert row["settings"]["masks"] == "half" and row["settings"]["sampling"]["sampler"] == "ddim"

    run(
        "held_out", f"--workdir={folder}", "--split=train", "--num=6", "--batch_size=6",
        "--times=2", f"--out={tmp_path / 'held_out.json'}",
    )  # fmt: skip
    (result,) = json.loads((tmp_path / "held_out.json").read_text())
    assert result["settings"]["images"]["count"] == 6
    assert np.isfinite(result["metrics"]["loss"]["value"])
