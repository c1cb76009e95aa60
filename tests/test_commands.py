"""Tests of the commands in processes of their own: killed, resumed, and with wrong input."""

import configparser
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from quick import ROOT, environment

from conprediff_jax.common.lock import LockedError, locked
from conprediff_jax.metrics.image_sets import read_samples

CONFIG = ROOT / "tests" / "tiny.py"


BROKEN = """from conprediff_jax.config import default
def get_config():
    default().train.update(stepz=3)
"""


def command(module, *arguments):
    return [sys.executable, "-m", f"conprediff_jax.{module}", *map(str, arguments)]


def run(module, *arguments):
    return subprocess.run(
        command(module, *arguments), cwd=ROOT, env=environment(), capture_output=True, text=True
    )


def train_arguments(images, workdir, *overrides):
    return [
        f"--config={CONFIG}",
        f"--workdir={workdir}",
        f"--config.data.name={images}",
        "--config.train.steps=60",
        "--config.train.checkpoint_every=5",
        "--config.train.keep=100",
        "--config.seed=4294967295",  # the largest
        *overrides,
    ]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def killed_and_resumed(images, tmp_path_factory):
    """A run killed with no warning right after its first checkpoint appears, then started again."""
    workdir = tmp_path_factory.mktemp("killed")
    arguments = train_arguments(images, workdir)
    process = subprocess.Popen(
        command("main", *arguments), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not (workdir / "checkpoints" / "5").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(LockedError, match=f"process {process.pid} on "), locked(workdir):
        pass
    process.kill()
    process.wait()
    assert not (workdir / "checkpoints" / "60").exists()
    return workdir, run("main", *arguments)


def restored(workdir):
    """Everything numeric in the final checkpoint, as orbax finds it."""
    import orbax.checkpoint as ocp

    folder = workdir / "checkpoints" / "60"
    return {name: ocp.StandardCheckpointer().restore(folder / name) for name in ("ema", "train")}


def test_a_killed_run_ends_where_the_uninterrupted_one_does(images, killed_and_resumed, tmp_path):
    import jax

    workdir, resumed = killed_and_resumed
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step" in resumed.stderr
    for said in ("steps/s", "images/s", "left", "sample grid: ", "checkpoints: ", "TensorBoard"):
        assert said in resumed.stderr
    whole = run("main", *train_arguments(images, tmp_path))
    assert whole.returncode == 0, whole.stderr
    for a, b in zip(*map(jax.tree.leaves, (restored(tmp_path), restored(workdir))), strict=True):
        np.testing.assert_array_equal(a, b)


def test_sample_writes_grids_arrays_and_single_images(killed_and_resumed, tmp_path):
    workdir, _ = killed_and_resumed
    arguments = [f"--workdir={workdir}", "--num=5", "--batch_size=2", "--seed=4294967295"]
    npz = run("sample", *arguments, f"--out={tmp_path / 'images.npz'}", "--sampler=ddpm")
    assert npz.returncode == 0, npz.stderr
    assert "5/5 images" in npz.stderr and str(tmp_path / "images.npz") in npz.stderr
    with np.load(tmp_path / "images.npz") as found:
        arrays, kept = found["arr_0"], json.loads(found["settings"].item())
    assert arrays.shape == (5, 8, 8, 3) and arrays.dtype == np.uint8
    assert read_samples(tmp_path / "images.npz").count == 5  # the record is no image
    assert kept["sampling"]["sampler"] == "ddpm" and (kept["step"], kept["num"]) == (60, 5)

    out = tmp_path / "images"
    some = ["--sampler=ddpm", "--first=2", "--num=2", f"--out={out}"]
    folder = run("sample", *arguments, *some)
    assert folder.returncode == 0, folder.stderr
    grown = run("sample", *arguments, *some, "--num=3")
    assert grown.returncode == 0, grown.stderr
    assert "2 of 3 images are there" in grown.stderr
    files = sorted(out.glob("*.png"))
    assert [f.name for f in files] == [f"{i:06}.png" for i in range(2, 5)]
    np.testing.assert_array_equal(np.stack([Image.open(f) for f in files]), arrays[2:])
    noted = json.loads((out / "settings.json").read_text())
    assert noted == {key: value for key, value in kept.items() if key != "num"}

    grid = run("sample", *arguments, "--sampler=ddpm")
    assert grid.returncode == 0, grid.stderr
    (file,) = (workdir / "samples").glob("sample_*.png")
    steps = kept["sampling"]["steps"]
    assert file.name == f"sample_step_0000060_ddpm_{steps}_seed_4294967295_num_5.png"
    assert json.loads(Image.open(file).text["settings"]) == kept


def test_only_one_of_two_runs_may_sample_into_a_new_folder(killed_and_resumed, tmp_path):
    arguments = [f"--workdir={killed_and_resumed[0]}", "--num=5", "--batch_size=2"]
    started = [
        subprocess.Popen(
            command("sample", *arguments, f"--seed={seed}", f"--out={tmp_path / 'new'}"),
            cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True,
        )
        for seed in range(2)
    ]  # fmt: skip
    said = [process.communicate()[1] for process in started]
    codes = [process.returncode for process in started]
    assert sorted(codes) == [0, 2], said
    last = said[codes.index(2)].splitlines()[-1]
    assert last.startswith("error: ") and last.endswith(
        "name another folder, or overwrite this one"
    )
    alone = tmp_path / "alone.npz"
    assert run("sample", *arguments, f"--seed={codes.index(0)}", f"--out={alone}").returncode == 0
    files = [tmp_path / "new" / f"{i:06}.png" for i in range(5)]
    assert sorted((tmp_path / "new").glob("*.png")) == files
    np.testing.assert_array_equal(np.stack([Image.open(f) for f in files]), np.load(alone)["arr_0"])


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (
            "main",
            ["--config={config}", "--config.train.stepz=3"],
            "no key 'stepz': did you mean 'steps'",
        ),
        (
            "main",
            ["--config={config}", "--config.train.steps=abc"],
            "steps is 'abc': it must",
        ),
        ("main", ["--config={config}", "--wrokdir=x"], "Did you mean: workdir"),
        ("main", ["--config={broken}"], 'broken.py, line 3: Key "stepz" does not exist'),
        ("main", ["--config=configs/missing.py"], "configs/missing.py"),
        ("main", ["--config={config}", "--config.context.transport=emd"], "'sinkhorn'"),
        ("main", ["--config={config}", "--config.data.name=celeb_a_hq/256"], "downloads/manual"),
        ("main", ["--config={config}", "--config.data.name=./nowhere"], "no such folder"),
        (
            "main",
            ["--config={config}", "--config.mesh.fsdp=2", "--config.data.name={images}"],
            "does not match the 1 devices",
        ),
        ("held_out", ["--workdir={workdir},{workdir}/nothing"], "nothing/checkpoints"),
        ("sample", ["--workdir={workdir}/nothing"], "a workdir is a folder that training wrote"),
        ("sample", ["--workdir={workdir}", "--steps=0"], "steps"),
        ("sample", ["--workdir={workdir}", "--step=7"], "no step 7"),
        ("sample", ["--workdir={workdir}", "--eta=1", "--sampler=ddpm"], "error: --eta is 1.0: on"),
        ("sample", ["--workdir={workdir}", "--label=3"], "no classes"),
        ("sample", ["--workdir={workdir}", "--out={folder}"], "folder.png: is a folder"),
        (
            "sample",
            ["--workdir={workdir}", "--out=x.gif"],
            "--out is x.gif: its ending must be one",
        ),
        (
            "held_out",
            ["--workdir={workdir}", "--out={folder}"],
            "folder.png: is a folder, and must",
        ),
        (
            "evaluate",
            ["--workdir={workdir}", "--reference=./nowhere", "--cache={broken}/cache"],
            "broken.py is a file, and must be a folder",
        ),
        ("sample", ["stray", "--workdir={workdir}"], "stray"),
    ],
)
def test_bad_input_is_reported_in_one_line(
    module, arguments, message, killed_and_resumed, tmp_path
):
    broken = tmp_path / "broken.py"
    broken.write_text(BROKEN)
    (tmp_path / "folder.png").mkdir()
    names = {"config": CONFIG, "broken": broken, "folder": tmp_path / "folder.png"}
    names["images"] = ROOT / "docs"
    names["workdir"] = killed_and_resumed[0]
    given = [a.format(**names) for a in arguments]
    if module == "main":
        given.append(f"--workdir={tmp_path / 'run'}")
    result = run(module, *given)
    assert result.returncode == 2  # which launchers do not try again
    errors = [line for line in result.stderr.splitlines() if "rror" in line]
    assert len(errors) == 1 and errors[0].startswith("error: "), result.stderr
    assert message in errors[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_requirements_pin_every_dependency():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = setup["options"]["install_requires"] + setup["options.extras_require"]["tfds"]
    asked = [Requirement(line) for line in wanted.split("\n") if line]
    here = {canonicalize_name(r.name) for r in asked if not r.marker or r.marker.evaluate()}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = {canonicalize_name(Requirement(line).name) for line in lines if line[0] != "#"}
    assert here and not here - pinned


def test_without_tensorflow_a_model_is_trained_on_a_folder_and_sampled(images, tmp_path):
    """Only data sets of TFDS and events of TensorBoard need it."""
    blocked = """
import runpy
from importlib.machinery import PathFinder
find = PathFinder.find_spec
hidden = ("tensorflow", "tensorflow_datasets")
PathFinder.find_spec = lambda name, *rest: None if name in hidden else find(name, *rest)
"""

    def run_without(module, *arguments):
        code = f"{blocked}runpy.run_module('conprediff_jax.{module}', run_name='__main__')"
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=ROOT, env=environment(), capture_output=True, text=True,
        )  # fmt: skip

    workdir = tmp_path / "run"
    arguments = train_arguments(images, workdir, "--config.train.steps=1")
    done = run_without("main", *arguments)
    assert done.returncode == 0, done.stderr
    assert 'metrics go to metrics.jsonl alone: pip install -e ".[tfds]"' in done.stderr
    assert json.loads((workdir / "metrics.jsonl").read_text())["step"] == 1
    assert not list(workdir.glob("events*"))
    done = run_without(
        "sample", f"--workdir={workdir}", "--num=4", f"--out={tmp_path / 'grid.png'}"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "grid.png").exists()
    arguments = train_arguments("openmoji/people", tmp_path / "other")
    refused = run_without("main", *arguments)
    assert refused.returncode == 2
    wanted = 'tensorflow_datasets, which is not installed: pip install -e ".[tfds]"'
    assert refused.stderr.splitlines()[-1] == f"error: this needs {wanted}"
