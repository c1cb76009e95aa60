"""Tests of a denoiser and a process from outside the package, in every command."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tiny
from quick import environment

from conprediff_jax.common import keys
from conprediff_jax.common.registry import Registry
from conprediff_jax.context import ContextPrediction
from conprediff_jax.data import DataSpec
from conprediff_jax.models.unet import UNet

pytestmark = pytest.mark.every_python

PLUGIN = '''
"""Straight lines between data and noise, t = 0 .. T-1, and a denoiser of two convolutions."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from conprediff_jax.common.keys import derived, fixed
from conprediff_jax.diffusion.process import PROCESSES, Corrupted
from conprediff_jax.diffusion.samplers import Walk
from conprediff_jax.diffusion.times import TableTimes
from conprediff_jax.models.denoiser import DENOISERS, Denoised
from conprediff_jax.sampling.spec import SAMPLINGS, SamplingSpec


@DENOISERS.register("two_layers")
class TwoLayers(nn.Module):
    out_channels: int = derived()
    width: int = 16

    discrete, downsampling, num_classes, learned_null = False, 1, None, False

    @nn.compact
    def __call__(self, x, t, *, label=None, text=None, unconditional=None, train=False):
        time = jnp.broadcast_to(t[:, None, None, None] / 10, (*x.shape[:-1], 1))
        h = nn.silu(nn.Conv(self.width, (3, 3))(jnp.concatenate([x, time], axis=-1)))
        return Denoised(nn.Conv(self.out_channels, (3, 3))(h), h)


@PROCESSES.register("lines")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Lines(TableTimes):
    num_steps: int = fixed(10)

    discrete = False

    def prior(self, rngs, shape):
        return jax.vmap(lambda rng: jax.random.normal(rng, shape))(rngs)

    def alpha_bar(self, t):
        return jnp.square(1 - (t + 1) / self.num_steps).astype(jnp.float32)

    def corrupt(self, rngs, x_0, t):
        noise = jax.vmap(lambda rng, x: jax.random.normal(rng, x.shape))(rngs, x_0)
        share = ((t + 1) / self.num_steps).reshape(-1, 1, 1, 1)
        return Corrupted((1 - share) * x_0 + share * noise, noise)

    def loss(self, output, x_0, x_t, noise, t):
        return jnp.square(output - (noise - x_0)).mean(axis=(1, 2, 3))

    def predict_x0(self, output, x_t, t):
        return x_t - ((t + 1) / self.num_steps).reshape(-1, 1, 1, 1) * output

    def guide(self, conditional, unconditional, guidance):
        return conditional


class Euler:
    def __init__(self, process):
        self.process = process

    def walk(self, denoise, x_T, keys, known=None):
        def step(x, t):
            return x - denoise(x, jnp.full(len(x), t)) / self.process.num_steps

        return Walk(x_T, jnp.arange(self.process.num_steps)[::-1], step, lambda x: x)


@SAMPLINGS.register("lines")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LineSampling(SamplingSpec):
    def make(self, process):
        return Euler(process)
'''

CONFIG = """
import tiny_plugin

from conprediff_jax.config import default, section


def get_config():
    config = default().unlock()
    config.imports = ("tiny_plugin",)
    config.data.update(name=IMAGES, image_size=8, threads=1)
    config.model = section(tiny_plugin.TwoLayers, kind="two_layers", width=8)
    config.process = section(tiny_plugin.Lines, kind="lines")
    config.sampling = section(tiny_plugin.LineSampling)
    config.context.update(hidden=8, latent=4, samples=2, iterations=2, strides=(1,))
    config.train.update(steps=4, batch_size=4, checkpoint_every=2, log_every=1)
    config.sampling.num = 2
    return config.lock()
"""


def command(folder: pathlib.Path, *arguments: str) -> str:
    """The output of a command that runs with the plugin's folder on the path."""
    path = f"{folder}:{pathlib.Path(__file__).parent.parent}"
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=path),
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_denoiser_and_a_process_from_outside_train_resume_and_sample(tmp_path):
    images = tiny.write_images(tmp_path / "images")
    (tmp_path / "tiny_plugin.py").write_text(PLUGIN)
    config = tmp_path / "mine.py"
    config.write_text(CONFIG.replace("IMAGES", repr(str(images))))
    main = ("conprediff_jax.main", f"--config={config}")
    command(tmp_path, *main, f"--workdir={tmp_path}/whole")
    command(tmp_path, *main, f"--workdir={tmp_path}/parts", "--config.train.steps=2")
    said = command(tmp_path, *main, f"--workdir={tmp_path}/parts")
    assert "resuming at step 2" in said
    drawn = []
    for name in ("whole", "parts"):
        out = tmp_path / f"{name}.npz"
        command(tmp_path, "conprediff_jax.sample", f"--workdir={tmp_path}/{name}", f"--out={out}")
        drawn.append(np.load(out)["arr_0"])
    assert drawn[0].shape == (64, 8, 8, 3)
    np.testing.assert_array_equal(*drawn)


def test_kinds_are_known_by_one_name_each():
    kinds = Registry("denoiser")
    kinds.register("unet")(UNet)
    kinds.register("unet")(UNet)  # as when a config file is executed again
    assert list(kinds) == ["unet"] and "unet" in kinds
    with pytest.raises(ValueError, match="there is a denoiser of kind 'unet' already"):
        kinds.register("unet")(ContextPrediction)
    with pytest.raises(ValueError, match=r"kind is 'dit': choose one of \('unet',\)"):
        kinds["dit"]


def test_fields_say_what_may_change_when_a_run_goes_on():
    assert "out_channels" in keys.derived_names(UNet)
    assert {"channels", "num_classes"} <= set(keys.fixed_names(UNet))
    assert not {"dropout", "remat", "out_channels", "parent"} & set(keys.fixed_names(UNet))
    assert set(keys.fixed_names(ContextPrediction)) == {
        *("strides", "decoder", "source", "hidden", "latent", "depth", "kernel", "target"),
        *("tap", "shared_decoder", "coarse_tap"),
    }
    assert set(keys.switch_names(ContextPrediction)) == {"weight", "cosine_every"}
    assert keys.guarded_names(DataSpec) == ["name", "split", "label", "class_names", "text"]
