"""Tests of whole models on the Hub: by the Python API, by configs, and by the commands."""

import pathlib
import subprocess
import sys

import convert_tiny as tiny
import hub_server
import jax
import numpy as np
import pytest
from huggingface_hub import ModelCard, constants
from quick import environment

import conprediff_jax
from conprediff_jax.common import hub
from conprediff_jax.interop import formats, pretrained
from conprediff_jax.runs.first_stage import load_params

ROOT = pathlib.Path(__file__).parent.parent

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch, hub_server.serving(patch, cache) as server:
        patch.setenv("HF_TOKEN", hub_server.TOKEN)
        yield server
    hub._downloaded.cache_clear()


def upload(server, folder, repo):
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    server.add(repo, files)


def test_a_pipeline_on_the_hub_is_read_and_named_by_its_address(server, tmp_path):
    model = tiny.pretrained(tiny.vq())
    formats.write(model, "diffusers", str(tmp_path / "out"))
    upload(server, tmp_path / "out", "someone/vq")
    back = formats.read("hf://someone/vq@main", "diffusers")
    tiny.assert_equal(back.params, model.params)
    assert back.origin == "hf://someone/vq@main"
    assert back.config.first_stage.weights == "hf://someone/vq/vqvae@main"
    params = load_params(back.diffusion.first_stage)
    tiny.assert_equal(params, model.frozen["autoencoder"])


def test_a_model_is_pushed_by_the_command_and_opened_by_its_address(server, tmp_path):
    model = tiny.pretrained(tiny.pixels())
    formats.write(model, "inference", str(tmp_path / "model"))
    variables = {
        "HF_ENDPOINT": constants.ENDPOINT,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    arguments = ["export", f"--workdir={tmp_path / 'model'}", "--to=inference", "--license=mit"]
    done = subprocess.run(
        [sys.executable, "-m", "conprediff_jax.convert", *arguments, "--push=hf://me/model"],
        cwd=ROOT, env=environment(**variables), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"uploaded as {constants.ENDPOINT}/me/model/commit/" in done.stderr
    files = server.commits["me/model", server.branches["me/model"]["main"]]
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.library_name) == ("mit", "conprediff_jax")
    assert 'conprediff_jax.load("hf://me/model")' in card.text

    opened = conprediff_jax.load("hf://me/model")
    np.testing.assert_array_equal(opened.sample(2), tiny.draw(model, 2))
    again = pretrained.open_folder("hf://me/model")
    tiny.assert_equal(again.params, jax.tree.map(np.asarray, model.params))
