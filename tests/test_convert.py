"""Tests of our own formats, the exported program, the Python API, and training from a model."""

import json
import pathlib
import re
import subprocess
import sys

import convert_tiny as tiny
import jax
import numpy as np
import pytest
from huggingface_hub import ModelCard
from quick import environment
from safetensors import safe_open

import conprediff_jax
from conprediff_jax import parallel
from conprediff_jax.common.errors import UserError
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.data import Tokenizer
from conprediff_jax.interop import formats, pretrained, stablehlo
from conprediff_jax.metrics import results
from conprediff_jax.metrics.bootstrap import Figure
from conprediff_jax.runs import restore
from conprediff_jax.sampling import record
from conprediff_jax.sampling.inpainting import sampling_for
from conprediff_jax.tasks.state import TrainState, abstract_state, init_state
from conprediff_jax.train import start_from

ROOT = pathlib.Path(__file__).parent.parent

pytestmark = pytest.mark.usefixtures("one_device")


def with_classes():
    """A class-conditional model on patches, which only our own formats can store."""
    config = tiny.pixels(steps=4).unlock()
    config.first_stage.patch = 2
    with config.model.ignore_type():
        config.model.update(channel_mult=(1,), attention_downsampling=(), num_classes=3)
    return config.lock()


@pytest.fixture(scope="module")
def model():
    return tiny.pretrained(with_classes())


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The model as an inference folder."""
    out = tmp_path_factory.mktemp("out") / "model"
    formats.write(model, "inference", str(out))
    return out


@pytest.mark.parametrize(
    "make", [tiny.vq, tiny.tokens, with_classes, tiny.reading_along, tiny.reading_tokens]
)
@pytest.mark.parametrize("to", ["inference", "safetensors"])
def test_own_formats_round_trip_bit_for_bit(make, to, tmp_path):
    model, out = tiny.pretrained(make()), str(tmp_path / "out")
    formats.write(model, to, out)
    back = pretrained.open_folder(out) if to == "inference" else formats.read(out, to)
    tiny.assert_equal(back.params, model.params)
    tiny.assert_equal(back.frozen, model.frozen)
    assert back.step == 3
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored == json.loads(back.config.to_json()) == json.loads(model.config.to_json())
    if model.diffusion.text:
        assert back.diffusion.text == model.diffusion.text
        tokenizer = Tokenizer.from_file(tmp_path / "out", length=12)
        captions = ["the cat in a hat", ""]
        np.testing.assert_array_equal(tokenizer(captions), model.diffusion.tokenizer(captions))


def test_safetensors_have_metadata(model, tmp_path):
    formats.write(model, "safetensors", str(tmp_path / "out"))
    with safe_open(tmp_path / "out" / "denoiser.safetensors", "np") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert metadata["format"] == "conprediff_jax" and metadata["step"] == "3"
    assert json.loads(metadata["config"])["model"]["num_classes"] == 3
    assert "input_conv/kernel" in names and not any("context" in name for name in names)
    assert (tmp_path / "out" / "denoiser.safetensors").stat().st_mode & 0o044  # for others too


def test_an_inference_folder_is_a_workdir_without_training(folder, model):
    mesh = parallel.make_mesh(parallel.MeshSpec())
    task, params, frozen, step, *_ = restore.load(str(folder), mesh)
    tiny.assert_equal(jax.tree.map(np.asarray, params), model.params)
    assert (frozen, step) == ({}, 3) and task.num_classes == 3
    items = {path.name for path in (folder / "checkpoints" / "3").iterdir()}
    assert {"ema", "extra", "config"} <= items and not items & {"train", "data"}


def test_nothing_is_overwritten_or_left_half_written(model, folder, tmp_path):
    with pytest.raises(UserError, match="exists already"):
        formats.write(model, "inference", str(folder))
    with pytest.raises(UserError, match=r"README\.md: not a table of results"):
        formats.write(model, "inference", str(tmp_path / "out"), metrics=str(folder / "README.md"))
    assert not list(tmp_path.iterdir())


def test_the_card_describes_the_model(model, tmp_path):
    metrics = tmp_path / "metrics.json"
    figures = {"FID": Figure(12.345678, 11.0, 13.0), "IS": Figure(2.0)}
    own = {"step": 3, "parameters": record.parameters_of(model.params, model.frozen)}
    table = results.ResultsTable(metrics)
    other_step, other_run = own | {"step": 2}, own | {"parameters": "0"}
    for settings in (other_step, other_run):
        table.add(settings, {"FID": Figure(99.0)})
    arguments = (model, "inference", str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"no figures of step 3 with these parameters"):
        formats.write(*arguments, metrics=str(metrics))
    table.add(own | {"samples": {"count": 50_000}}, figures)
    formats.write(*arguments, metrics=str(metrics), license="apache-2.0")
    card = (tmp_path / "out" / "README.md").read_text()
    header = ModelCard(card).data.to_dict()
    assert header == {
        "library_name": "conprediff_jax",
        "pipeline_tag": "unconditional-image-generation",
        "license": "apache-2.0",
        "tags": ["diffusion", "jax", "conprediff_jax", "conprediff", "arxiv:2401.02015"],
        "datasets": ["openmoji"],
        "metrics": ["fid", "is"],
    }
    assert "99" not in card.partition("## Config")[0].partition("## Metrics")[2]
    for said in (
        "| 12.35 [11, 13] | 2 |",
        "* samples.count: 50000",
        "| steps | 3 of 64 examples |",
        "openmoji/people",
        "| classes | 3 |",
        "strides (1, 2, 3)",
        '"prediction": "epsilon"',
    ):
        assert said in card, said


def test_the_api_samples_encodes_and_decodes(folder, model):
    opened = conprediff_jax.load(str(folder))
    images = opened.sample(3, label=1)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, tiny.draw(model, 3, np.ones(3, int)))
    single = opened.sample(3, label=1, batch_size=1)
    assert np.abs(single.astype(int) - images).max() <= 1
    assert not np.array_equal(opened.sample(3, label=1, steps=5), images)
    points = opened.encode(images)
    assert points.shape == (3, 4, 4, 12)
    np.testing.assert_array_equal(opened.decode(points), images)
    assert "step 3" in repr(opened)
    for arguments, message in (
        ({"label": 3}, "whole number from 0 to 2"),
        ({"steps": 0}, "steps is 0"),
        ({"guidance": 2.0}, "guidance is 2.0"),
        ({"prompts": "a cat"}, "reads no captions"),
        ({"truncation": 0.5}, "truncation does not fit"),
    ):
        with pytest.raises(UserError, match=message):
            opened.sample(1, **arguments)


def test_the_api_fills_holes(folder):
    opened = conprediff_jax.load(str(folder))
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    masks = np.random.default_rng(1).random((3, 8, 8)) < 0.5
    settings = {"label": 1, "steps": 4, "jump_length": 2, "resamplings": 1}
    filled = opened.inpaint(images, masks, **settings)
    assert filled.shape == images.shape and filled.dtype == np.uint8
    np.testing.assert_array_equal(filled[masks], images[masks])
    assert (filled != images).any(-1)[~masks].mean() > 0.9
    # Unknown pixels do not matter, 255 means known as True does, and nothing is compiled again.
    hidden = np.where(masks[..., None], images, 0)
    again = opened.inpaint(hidden, np.uint8(255) * masks, **settings)
    np.testing.assert_array_equal(again, filled)
    spec = sampling_for(opened.diffusion, steps=4, jump_length=2, resamplings=1)
    assert opened._fill(spec)._cache_size() == 1
    one = opened.inpaint(images, masks[0], seed=1, label=0, steps=4, sampler="ddim")
    np.testing.assert_array_equal(one[:, masks[0]], images[:, masks[0]])
    for arguments, message in (
        ({"masks": masks[:2]}, r"masks has the shape \(2, 8, 8\): \(3, 8, 8\) or \(8, 8\)"),
        ({"masks": masks, "label": 3}, "whole number from 0 to 2"),
        ({"masks": masks, "prompt": "a cat"}, "reads no captions"),
        ({"masks": masks, "resamplings": 0}, "resamplings"),
    ):
        with pytest.raises(UserError, match=message):
            opened.inpaint(images, **arguments)


def test_the_api_compiles_once_for_a_shape(folder):
    opened = conprediff_jax.load(str(folder))
    generate = opened._generate(opened.diffusion.sampling, None)
    for seed in range(2):
        opened.sample(2, seed=seed, label=0)
        opened.sample(2, seed=seed, label=1)
    assert opened._generate(opened.diffusion.sampling, None) is generate
    assert generate._cache_size() == 1


def python(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
    )


def test_importing_the_package_is_cheap():
    code = "import sys, conprediff_jax; assert not {'jax', 'flax', 'numpy'} & sys.modules.keys()"
    result = python("-c", code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("make", [with_classes, tiny.tokens, tiny.reading_along])
def test_the_exported_program_runs_from_its_files_with_jax_alone(make, tmp_path):
    """The snippet of the card, in a process that can import neither this package nor Flax."""
    model = tiny.pretrained(make())
    formats.write(model, "stablehlo", str(tmp_path / "out"))
    [snippet] = re.findall(
        r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S
    )
    blocked = "import sys; sys.modules |= dict.fromkeys(['conprediff_jax', 'flax'])\n"
    result = python("-c", blocked + snippet, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    images = np.load(tmp_path / "images.npz")["arr_0"]
    assert images.shape == (8, 8, 8, 3) and images.dtype == np.uint8
    labels = np.arange(8) % 3 if model.diffusion.num_classes else None
    captions = [tiny.CAPTIONS[0]] * 8 if model.diffusion.text else None
    ours = tiny.draw(model, 8, labels, captions)
    assert ours.std() > 10
    assert np.abs(images.astype(int) - ours).max() <= 1


def test_the_exported_program_has_every_platform_and_batch_size(tmp_path):
    from jax import export

    model = tiny.pretrained(with_classes())
    formats.write(model, "stablehlo", str(tmp_path / "out"))
    program = export.deserialize(bytearray((tmp_path / "out" / stablehlo.PROGRAM).read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    about = json.loads((tmp_path / "out" / stablehlo.ABOUT).read_text())
    assert about["written by"] == f"jax {jax.__version__}"
    assert about["calling convention"] == program.calling_convention_version
    assert about["promised to load in"] in (tmp_path / "out" / "README.md").read_text()
    assert str(program.out_avals[0].shape) == "(count, 8, 8, 3)"


def fresh(config):
    experiment = make_experiment(config)
    optimizer = experiment.optimizer.make(experiment.train.steps)
    mesh = parallel.make_mesh(parallel.MeshSpec())
    abstract = abstract_state(experiment.task, optimizer, mesh)
    return experiment.task, init_state(experiment.task, optimizer, abstract)


def test_training_can_start_from_a_model(model, folder):
    """The denoiser and its average are those of the model; the context decoder is new."""
    config = with_classes().unlock()
    config.context.update(hidden=16, latent=4, samples=4, iterations=5)
    config.process.loss_norm = "l1"  # what only the loss reads may differ
    config.model.dropout = 0.1
    task, state = fresh(config.lock())
    started = start_from.start_from(str(folder), state, task)
    for tree in (started.params["denoiser"], started.ema):
        tiny.assert_equal(jax.tree.map(np.asarray, tree), model.params)
    tiny.assert_equal(*(jax.tree.map(np.asarray, s.params["context"]) for s in (started, state)))
    assert int(started.step) == 0
    pointers = [
        leaf.unsafe_buffer_pointer()
        for tree in (started.params, started.ema)
        for leaf in jax.tree.leaves(tree)
    ]
    assert len(set(pointers)) == len(pointers)  # no step can donate a buffer twice


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model", {"channels": 64}, r"its denoiser is another one: channels 32 there, 64 here"),
        (
            "process",
            {"prediction": "v"},
            "process is another one: prediction epsilon there, v here",
        ),
        ("data", {"image_size": 16}, r"points of \(4, 4, 12\) there, \(8, 8, 12\) here"),
        ("first_stage", {"patch": 4}, "first_stage is another one: patch 2 there, 4 here"),
    ],
)
def test_training_does_not_start_from_another_model(section, changes, message, folder):
    config = with_classes().unlock()
    config[section].update(changes)
    task = make_experiment(config).task
    state = TrainState(step=0, params={}, ema={}, opt_state=(), task_state={})
    with pytest.raises(UserError, match=message) as error:
        start_from.start_from(str(folder), state, task)
    assert "\n" not in str(error.value)


def convert(*arguments):
    return python("-m", "conprediff_jax.convert", *arguments)


def test_the_command_exports_and_imports(tmp_path):
    model = tiny.pretrained(tiny.pixels())
    formats.write(model, "inference", str(tmp_path / "run"))
    there = convert(
        "export", f"--workdir={tmp_path / 'run'}", "--to=diffusers", f"--out={tmp_path / 'there'}",
        "--steps=6",
    )  # fmt: skip
    assert there.returncode == 0, there.stderr
    assert f"as diffusers to {tmp_path / 'there'}" in there.stderr
    assert "num_inference_steps=6" in (tmp_path / "there" / "README.md").read_text()
    back = convert("import", tmp_path / "there", "--from=diffusers", f"--out={tmp_path / 'back'}")
    assert back.returncode == 0, back.stderr
    tiny.assert_equal(pretrained.open_folder(str(tmp_path / "back")).params, model.params)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "--workdir={folder}", "--to=diffusers", "--out={out}"], "3 classes"),
        (["export", "--to=diffusers", "--out={out}"], "export needs --workdir"),
        (
            ["import", "model.ckpt", "--from=ldm", "--out={out}"],
            "a model, one of celebahq",
        ),
        (["import", "model.ckpt", "--from=ldm", "--model=ffhq", "--out={out}"], "no such file"),
        (["import", "--from=ldm", "--out={out}"], "import PATH"),
    ],
)
def test_bad_input_is_reported_in_one_line(arguments, message, folder, tmp_path):
    given = [a.format(folder=folder, out=tmp_path / "out") for a in arguments]
    result = convert(*given)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if "rror" in line]
    assert len(errors) == 1 and errors[0].startswith("error: "), result.stderr
    assert message in errors[0]
    assert not list(tmp_path.iterdir())
