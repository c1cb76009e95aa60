"""Tests that every option of every diffusers class is used, has no effect, or is refused.

The options come from the signatures of the diffusers that is installed, so a version with new
options fails here until these are declared.
"""

import collections
import inspect
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from convert_pipelines import assert_same_images, their_unet, theirs
from convert_tiny import draw
from diffusers.schedulers import scheduling_ddpm
from fuzzing import fuzz

from conprediff_jax.common.errors import UserError
from conprediff_jax.diffusion.gaussian import GaussianProcess
from conprediff_jax.diffusion.samplers import step_noise
from conprediff_jax.interop.diffusers import pipeline as diffusers_pipeline
from conprediff_jax.sampling.spec import GaussianSampling
from conprediff_jax.weights.diffusers import autoencoder as diffusers_autoencoder
from conprediff_jax.weights.diffusers import schedulers as diffusers_schedulers
from conprediff_jax.weights.diffusers import transformer as diffusers_transformer
from conprediff_jax.weights.diffusers import unet as diffusers_unet
from conprediff_jax.weights.diffusers.options import REQUIRED, DiffusersError

SCHEDULERS = diffusers_schedulers.SCHEDULERS
PIPELINES = diffusers_pipeline.PIPELINES


def options_of(function):
    """The options of a function of diffusers and their defaults."""
    parameters = dict(inspect.signature(function).parameters)
    parameters.pop("self", None)
    empty = inspect.Parameter.empty
    return {
        name: REQUIRED if parameter.default is empty else parameter.default
        for name, parameter in parameters.items()
    }


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_option_of_a_scheduler_is_declared_with_its_default(name):
    declared = {option: key.default for option, key in SCHEDULERS[name].items()}
    assert declared == options_of(getattr(diffusers, name).__init__)


@pytest.mark.parametrize("name", PIPELINES)
def test_every_part_of_a_pipeline_and_its_defaults_are_declared(name):
    pipeline = getattr(diffusers, name)
    declared = {*PIPELINES[name].parts, *PIPELINES[name].left_aside}
    assert declared == options_of(pipeline.__init__).keys()
    untold = options_of(pipeline.__call__)
    assert PIPELINES[name].steps == untold["num_inference_steps"]
    assert PIPELINES[name].guidance == untold.get("guidance_scale", 1.0)
    # What we do as well, untold.
    for argument, value in {"eta": 0.0, "guidance_rescale": 0.0, "truncation_rate": 1.0}.items():
        assert untold.get(argument, value) == value


TOKENS = {
    "num_vector_embeds": 8,
    "num_embeds_ada_norm": 5,
    "sample_size": 4,
    "attention_bias": True,
    "activation_fn": "geglu-approximate",
    "norm_type": "ada_norm",
}
NETWORKS = {
    "UNet2DModel": (diffusers_unet.fields_from_diffusers, {}),
    "UNet2DConditionModel": (diffusers_unet.fields_from_diffusers, {}),
    "VQModel": (diffusers_autoencoder.fields_from_diffusers, {"scaling_factor": 0.18215}),
    "AutoencoderKL": (diffusers_autoencoder.fields_from_diffusers, {}),
    "Transformer2DModel": (diffusers_transformer.fields_from_diffusers, TOKENS),
}
# What a network is not made of, and why.
WITHOUT_EFFECT = {
    "UNet2DModel": {
        "sample_size",  # the pipeline's, see there
        "in_channels",  # the weights tell
        "num_train_timesteps",  # of learned time embeddings, which are refused
    },
    "UNet2DConditionModel": {"sample_size", "in_channels"},
    "VQModel": {"sample_size", "force_upcast"},  # everything is float32
    "AutoencoderKL": {"sample_size", "force_upcast"},
    "Transformer2DModel": {
        "norm_num_groups",  # of images
        "use_linear_projection",  # of images
    },
}


def other_values(value):
    """Values that an option might have besides its default."""
    match value:
        case bool():
            return [not value]
        case int() | float():
            return [2 * value + 1, value / 2, 64, 0]
        case str():
            return ["swish", "scale_shift", "other"]
        case tuple():
            return [[], value + value[:1], ["other"] * len(value)]
        case _:
            return [True, 2, 0.5, "other", [1, 2]]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_option_of_a_network_is_used_or_refused(name):
    read, base = NETWORKS[name]
    base = {"_class_name": name, **base}
    fields = read(base, name)
    ignored = set()
    for option, default in options_of(getattr(diffusers, name).__init__).items():
        if option not in base and default is not REQUIRED:  # left out, it is the class's
            assert read(base | {option: default}, name) == fields, option
        default = base.get(option, default)
        for value in other_values(default):
            if value == default:
                continue
            try:
                if read(base | {option: value}, name) == fields:
                    ignored.add(option)
            except UserError as error:
                assert "\n" not in str(error)
    assert ignored - {"act_fn"} == WITHOUT_EFFECT[name]  # one of its values is another's name
    with pytest.raises(DiffusersError, match="no counterpart for brand_new=1"):
        read(base | {"brand_new": 1}, name)


# --- Schedulers, alone: whole loops with the same noise ---

SHAPE = (2, 4, 3)


def their_scheduler(config, pipeline):
    """What a pipeline makes of the scheduler in a file."""
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    parts = options_of(getattr(diffusers, pipeline).__init__)
    parts = {name: None if value is REQUIRED else value for name, value in parts.items()}
    if pipeline == "DDIMPipeline":
        return diffusers.DDIMPipeline(unet=None, scheduler=scheduler).scheduler
    if pipeline == "StableDiffusionPipeline":
        parts |= {"scheduler": scheduler, "requires_safety_checker": False}
        return diffusers.StableDiffusionPipeline(**parts).scheduler
    return scheduler  # the others take it as it is


def denoiser(process):
    """A bounded smooth stand-in for a network, in the process's own terms."""
    mix = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    alpha_bars = np.append(process.alpha_bars, 1.0)

    def denoise(x, t):
        signal, sigma = (np.sqrt(a, dtype=np.float32) for a in (alpha_bars[t], 1 - alpha_bars[t]))
        v = np.tanh(x @ mix * 0.5 + np.sin(3 * t / process.num_steps, dtype=np.float32))
        if process.prediction == "epsilon":
            return signal * v + sigma * x
        return signal * x - sigma * v if process.prediction == "x0" else v

    return denoise


def their_loop(scheduler, pipeline, denoise, x_T, keys, monkeypatch):
    """As the pipelines have it."""
    x, arguments = torch.from_numpy(x_T), {}
    if pipeline == "DDIMPipeline":
        arguments["use_clipped_model_output"] = True
    for index, time in enumerate(scheduler.timesteps):
        z = torch.from_numpy(np.array(step_noise(keys, index, SHAPE[1:])))
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, z=z, **__: z)
        output = torch.from_numpy(denoise(x.numpy(), int(time)))
        x = scheduler.step(output, time, x, **arguments).prev_sample
    return x.numpy()


def our_loop(sampler, denoise, x_T, keys):
    with jax.disable_jit():
        return sampler.sample(
            lambda x, t: jnp.asarray(denoise(np.asarray(x), int(t[0]))), jnp.asarray(x_T), keys
        )


def compared(config, pipeline, steps, monkeypatch):
    """How an import and the pipeline itself compare: 'equal', or why there is no comparison.

    Raises:
        AssertionError: They sample differently.
    """
    try:
        process, sampling = diffusers_schedulers.gaussian_from_diffusers(
            config, "file", pipeline=pipeline
        )
        process = GaussianProcess(**process)
    except DiffusersError as error:
        assert "\n" not in str(error) and str(error).startswith("file: ")
        return "refused"
    if config["_class_name"] == "PNDMScheduler" and pipeline != "DDIMPipeline":
        return "another sampler, with a warning"
    try:
        sampler = GaussianSampling(**sampling, steps=steps).make(process)
    except ValueError as error:
        assert "\n" not in str(error)
        return "steps refused"
    try:
        scheduler = their_scheduler(config, pipeline)
    except NotImplementedError:  # of an option that the pipeline would have dropped
        return "not made there"
    scheduler.set_timesteps(steps)
    if len(scheduler.timesteps) == steps + 1 and scheduler.timesteps[-1] == -1:
        return "a time below 0 there"
    np.testing.assert_array_equal(scheduler.timesteps, sampler.times)
    denoise, keys = denoiser(process), jax.random.split(jax.random.key(0), SHAPE[0])
    x_T = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    expected = their_loop(scheduler, pipeline, denoise, x_T, keys, monkeypatch)
    found = our_loop(sampler, denoise, x_T, keys)
    # A point is found from its noise by a division by the signal, and so is the rounding of both.
    rounding = 3e-7 / np.sqrt(process.alpha_bars[sampler.times[0]])
    atol = rounding + 2e-3 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
    return "equal"


def random_config(rng):
    """The config of a scheduler: any options, few of them away from what is usual."""
    name = rng.choice(diffusers_schedulers.CONTINUOUS)
    config = {"_class_name": str(name)}
    usual = {
        "num_train_timesteps": lambda: int(rng.choice([8, 20, 37, 60, 100, 1000])),
        "beta_schedule": lambda: str(rng.choice(["linear", "scaled_linear", "squaredcos_cap_v2"])),
        "beta_start": lambda: float(rng.choice([1e-4, 0.00085, 0.0015])),
        "beta_end": lambda: float(rng.choice([0.012, 0.02, 0.0195])),
        "prediction_type": lambda: str(rng.choice(["epsilon", "sample", "v_prediction"])),
        "timestep_spacing": lambda: str(rng.choice(["leading", "trailing", "linspace"])),
        "steps_offset": lambda: int(rng.choice([0, 0, 1, 2, 5])),
        "clip_sample": lambda: bool(rng.integers(2)),
        "clip_sample_range": lambda: float(rng.choice([0.5, 1.0, 2.0])),
        "set_alpha_to_one": lambda: bool(rng.integers(2)),
        "lambda_min_clipped": lambda: float(rng.choice([-np.inf, -5.1, -3.0, -1.0])),
        "variance_type": lambda: str(rng.choice(["fixed_small", "fixed_small_log"])),
        "lower_order_final": lambda: bool(rng.integers(2)),
        "euler_at_final": lambda: bool(rng.integers(2)),
        "skip_prk_steps": lambda: bool(rng.integers(2)),
        "sample_max_value": lambda: float(rng.choice([1.0, 1.5])),
        "flow_shift": lambda: 3.0,
    }
    for option, default in options_of(getattr(diffusers, name).__init__).items():
        if option in usual and rng.random() < 0.5:
            config[option] = usual[option]()
        elif rng.random() < 0.01:
            values = other_values(default)
            config[option] = values[rng.integers(len(values))]
    if name == "DPMSolverMultistepScheduler":
        config.pop("variance_type", None)
    if rng.random() < 0.2:  # kept from a scheduler of another class
        config |= {"skip_prk_steps": True, "set_alpha_to_one": False}
    return json.loads(json.dumps(config))


def test_random_schedulers_equal_those_of_diffusers_or_are_refused(monkeypatch):
    outcomes = collections.Counter()

    def check(rng):
        config = random_config(rng)
        pipelines = [name for name in PIPELINES if name != "VQDiffusionPipeline"]
        pipeline = str(rng.choice(pipelines))
        most = config.get("num_train_timesteps", 1000)
        steps = int(rng.integers(1, min(most, 24) + 1)) if type(most) is int and most > 0 else 4
        outcomes[compared(config, pipeline, steps, monkeypatch)] += 1

    fuzz(check, few=60)
    print(dict(outcomes))
    assert outcomes["equal"] > sum(outcomes.values()) / 4


DDPM = {"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}
DPM = {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "squaredcos_cap_v2"}
DDIM = {"_class_name": "DDIMScheduler", "num_train_timesteps": 37}
COSINE = DDIM | {"beta_schedule": "squaredcos_cap_v2"}


@pytest.mark.parametrize(
    ("config", "pipeline", "steps", "outcome"),
    [
        (DPM | {"lambda_min_clipped": -5.1}, "DDPMPipeline", 50, "equal"),
        (DPM | {"use_karras_sigmas": True}, "LDMPipeline", 9, "refused"),
        (DPM | {"use_karras_sigmas": True}, "DDIMPipeline", 9, "equal"),  # DDIM is made of it
        (DDIM, "StableDiffusionPipeline", 5, "equal"),  # neither clips nor begins at 0
        (DDIM | {"clip_sample": True, "steps_offset": 3}, "StableDiffusionPipeline", 5, "equal"),
        (DDIM, "LDMPipeline", 5, "equal"),  # clips, and lets epsilon be
        (DDIM | {"timestep_spacing": "linspace"}, "DDIMPipeline", 5, "equal"),
        (DDIM | {"timestep_spacing": "trailing"}, "DDPMPipeline", 8, "equal"),
        (DDIM | {"steps_offset": 2}, "DDPMPipeline", 31, "equal"),  # a stride of 1
        ({"_class_name": "PNDMScheduler", "steps_offset": 1}, "DDIMPipeline", 7, "equal"),
        (DDPM, "DDPMPipeline", 9, "equal"),
        (DDPM | {"timestep_spacing": "trailing"}, "DDPMPipeline", 9, "refused"),
        (DDPM | {"variance_type": "learned"}, "DDPMPipeline", 9, "refused"),
        (DDIM | {"clip_sample_range": 0.0}, "DDIMPipeline", 5, "refused"),
        (DDIM | {"clip_sample": None}, "DDIMPipeline", 5, "refused"),
        (DDIM | {"steps_offset": "1"}, "DDIMPipeline", 5, "refused"),
        (DDIM | {"beta_start": 0.5}, "DDIMPipeline", 5, "refused"),
        (COSINE | {"beta_start": 0.5}, "DDIMPipeline", 5, "equal"),  # which it does not read
        (DPM | {"lambda_min_clipped": 20.0}, "DDPMPipeline", 5, "refused"),
        (DDIM, "DDIMPipeline", 1, "steps refused"),
    ],
)  # fmt: skip
def test_schedulers_equal_those_of_diffusers_or_are_refused(
    config, pipeline, steps, outcome, monkeypatch
):
    assert compared(config, pipeline, steps, monkeypatch) == outcome


# --- Whole pipelines, by their folders ---


@pytest.mark.parametrize(
    ("pipeline", "scheduler", "untold", "steps"),
    [
        ("DDIMPipeline", {**DDIM, "timestep_spacing": "linspace"}, 37, 7),
        ("DDPMPipeline", {**DDIM, "clip_sample_range": 0.5}, 37, 6),
        # Of 200 times one is too noisy, and one more is left out.
        ("DDPMPipeline", {**DPM, "lambda_min_clipped": -5.1, "num_train_timesteps": 200}, 198, 6),
    ],
)
def test_pipelines_make_the_same_images(pipeline, scheduler, untold, steps, tmp_path, monkeypatch):
    """And as many steps, untold, or as many as there can be."""
    made = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    unet = their_unet(3, sample_size=[4, 4])  # the same twice
    getattr(diffusers, pipeline)(unet=unet, scheduler=made).save_pretrained(tmp_path / "theirs")
    model = diffusers_pipeline.read(str(tmp_path / "theirs"))
    assert model.diffusion.sampling.steps == untold
    model = model.resampled(steps=steps)
    found, _ = theirs(monkeypatch, tmp_path / "theirs", model, 2)
    assert_same_images(draw(model, 2), found)
