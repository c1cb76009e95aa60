"""Tiny models of every kind, with random weights, for the tests of conversion."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from conprediff_jax import config as config_lib
from conprediff_jax.common import random
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.config.sections import section
from conprediff_jax.data import Tokenizer
from conprediff_jax.diffusion import FlowProcess
from conprediff_jax.interop.pretrained import Pretrained
from conprediff_jax.models.dit import DiT
from conprediff_jax.sampling.generate import make_generate
from conprediff_jax.sampling.model import Condition
from conprediff_jax.sampling.spec import FlowSampling

AUTOENCODER = {"channels": 32, "channel_mult": (1, 2), "blocks_per_level": 1}


def continuous(first_stage=None, **sampling_settings):
    """Images of 8 x 8; points of 8 x 8 pixels or 4 x 4 latents."""
    config = config_lib.default().unlock()
    config.data.image_size = 8
    if first_stage is not None:
        config.first_stage = first_stage
    config.process.update(schedule="scaled_linear", num_steps=20, beta_start=0.01, beta_end=0.2)
    config.model.update(
        channels=32,
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention_downsampling=(2,),
        head_channels=16,
    )
    config.sampling.update({"num": 2, "steps": 4, "spacing": "leading", **sampling_settings})
    return config.lock()


def pixels(**sampling_settings):
    return continuous(**sampling_settings)


def original_ddpm():
    """The conventions of the original DDPM, which google/ddpm-cifar10-32 has."""
    config = pixels(sampler="ddpm", variance="fixed_large").copy_and_resolve_references().unlock()
    config.model.update(
        norm_epsilon=1e-6, time_endpoint=True, sine_first=True, centered_downsampling=False
    )
    return config.lock()


def flow():
    """Flow matching with diffusers' times."""
    config = pixels().copy_and_resolve_references().unlock()
    config.process = section(FlowProcess, kind="flow")
    config.sampling = section(FlowSampling, sampler="heun", spacing="linspace", num=2, steps=4)
    return config.lock()


def vq():
    """As published: the original steps, ending at alpha_bar_0; latents have no limits."""
    first_stage = config_lib.latents("vq", "nowhere", scale=0.7, num_codes=11, **AUTOENCODER)
    return continuous(first_stage, steps_offset=1, final="first", clip=0.0)


def kl():
    first_stage = config_lib.latents("kl", "nowhere", scale=0.3, latent_channels=4, **AUTOENCODER)
    return continuous(first_stage, clip=0.0)


def tokens():
    """4 x 4 tokens of 11 codes, five of which the model does not use."""
    first_stage = config_lib.tokens("nowhere", used_codes=6, num_codes=11, **AUTOENCODER)
    config = config_lib.default_discrete(first_stage).unlock()
    config.data.image_size = 8
    config.process.num_steps = 5
    config.model.update(width=32, num_layers=2, num_heads=2)
    config.sampling.update(num=2, steps=5, truncation=1.0)
    return config.lock()


def dit(**model):
    """A DiT with the classes of ImageNet and the conventions of diffusers, and guidance."""
    config = kl().copy_and_resolve_references().unlock()
    sizes = {"width": 16, "num_layers": 2, "num_heads": 2, "patch": 2, "num_classes": 1000}
    theirs = {"time_endpoint": True, "mlp_norm_epsilon": 1e-5}
    config.model = section(DiT, kind="dit", **sizes | theirs | model)
    config.data.class_names = tuple(f"class {number}, also {-number}" for number in range(1000))
    config.condition.dropout = 0.1
    config.sampling.guidance = 4.0
    return config.lock()


CAPTIONS = ("a red cat", "the cat and the red hat", "red red red")
SIZES = {"width": 16, "num_layers": 2, "num_heads": 2, "hidden": 24}


def reading(config, kind, tokenizer=None, null="empty", weights="", **encoder):
    """A model that reads captions, by guidance; its vocabulary is learnt where none is given."""
    length = encoder.setdefault("length", 12)
    tokenizer = tokenizer or Tokenizer.train(CAPTIONS, vocab_size=40, length=length)
    config = config.copy_and_resolve_references().unlock()
    config.text = config_lib.text(
        kind,
        weights=weights,
        prompts=CAPTIONS,
        **SIZES | {"vocab_size": tokenizer.vocab_size + 1, **encoder},
    )
    config.text.vocabulary = tokenizer.to_json()
    config.condition.update(dropout=0.1, null=null)
    config.data.update({"text": "caption"})
    config.sampling.guidance = 3.0
    return config.lock()


def eighth():
    """Latents of 1/8 of the image's size."""
    architecture = AUTOENCODER | {"channel_mult": (1, 1, 1, 1)}
    first_stage = config_lib.latents("kl", "nowhere", scale=0.5, latent_channels=4, **architecture)
    config = continuous(first_stage, clip=0.0).unlock()
    config.data.image_size = 32
    return config.lock()


def reading_along():
    """By an encoder that is trained along."""
    return reading(vq(), "bert", head_channels=8)


def reading_tokens():
    """By an encoder that is not, and a learned null text."""
    return reading(tokens(), "clip", null="learned", weights="nowhere", unit=True)


def random_like(tree, seed):
    """Random arrays in the shapes of a tree, scaled so that activations stay near one."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[-1] == "scale":  # of a norm
            return np.asarray(1 + 0.1 * noise, np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if path[-1] == "kernel" else 4
        return np.asarray(noise / np.sqrt(max(fan_in, 1)), np.float32)

    flat = traverse_util.flatten_dict(tree)
    return traverse_util.unflatten_dict({path: draw(path, leaf) for path, leaf in flat.items()})


def pretrained(config, seed=0):
    """A model with random weights for a config."""
    params, task_state = jax.eval_shape(make_experiment(config).task.init)
    frozen = dict(task_state["frozen"])
    if "autoencoder" in frozen:
        frozen["autoencoder"] = random_like(frozen["autoencoder"], seed + 1)
    if "text_encoder" in frozen:
        frozen["text_encoder"] = random_like(frozen["text_encoder"], seed + 2)
    if "scale" in frozen:
        frozen["scale"] = np.float32(config.first_stage.scale)
    if "codes" in frozen:
        used = [0, 2, 3, 5, 8, 10] if config.first_stage.used_codes else range(11)
        frozen["codes"] = np.array(used, np.int32)
    return Pretrained(
        config=config,
        params=random_like(params["denoiser"], seed),
        frozen=frozen,
        step=3,
        origin="runs/tiny",
    )


def apply(model, x, t, **condition):
    """The denoiser's output, float32."""

    @jax.jit
    def run(params, x, t):
        return model.diffusion.denoise(params, x, t, Condition(**condition)).output

    return np.asarray(run(model.params, jnp.asarray(x), jnp.asarray(t)))


def draw(model, num, labels=None, captions=None):
    """Images 0 to num - 1 of seed 0, uint8."""
    diffusion = model.diffusion
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor")
    )
    generate = make_generate(diffusion, diffusion.sampling, mesh)
    labels = None if labels is None else jnp.asarray(labels)
    texts = None if captions is None else jnp.asarray(diffusion.tokenizer(captions))
    return np.asarray(generate(model.params, model.frozen, 0, jnp.arange(num), labels, texts))


def keys(num):
    """The keys that `draw` gives to the prior and to the steps of each image."""
    return [
        random.example_keys(random.stream(0, f"sample/{name}"), jnp.arange(num))
        for name in ("prior", "steps")
    ]


def assert_equal(tree, other):
    """Bit for bit."""
    flat, other = traverse_util.flatten_dict(tree), traverse_util.flatten_dict(other)
    assert flat.keys() == other.keys()
    for path in flat:
        np.testing.assert_array_equal(flat[path], other[path], err_msg="/".join(path))
