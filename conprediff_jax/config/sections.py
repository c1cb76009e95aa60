"""Configs: plain ml_collections data, one section for each thing that is built.

`default()` holds every key there is, with the defaults of the classes behind the sections; a config
file starts from it, or from `default_first_stage()`, and changes what it needs. `build` turns a
section into its object and names the key of anything that does not fit, so that a config is checked
before anything expensive is made.
"""

import contextlib
import dataclasses
import difflib
import functools
import operator
import types
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder

from conprediff_jax.common import random
from conprediff_jax.common.errors import ConfigError, FieldError
from conprediff_jax.common.fields import conform, parse
from conprediff_jax.common.trees import flatten
from conprediff_jax.context import ContextPrediction
from conprediff_jax.data import DataSpec
from conprediff_jax.diffusion.categorical import CategoricalProcess
from conprediff_jax.diffusion.gaussian import GaussianProcess
from conprediff_jax.models.autoencoder import AutoencoderKL, VQModel
from conprediff_jax.models.first_stage import Latents, Pixels, Tokens
from conprediff_jax.models.text import TEXT_ENCODERS
from conprediff_jax.models.transformer import TokenTransformer
from conprediff_jax.models.unet import UNet
from conprediff_jax.parallel import MeshSpec
from conprediff_jax.sampling.spec import GaussianSampling, TokenSampling
from conprediff_jax.tasks.first_stage import FirstStageLoss
from conprediff_jax.tasks.optimizer import OptimizerSpec
from conprediff_jax.tasks.spec import ConditionSpec, TrainSpec

T = TypeVar("T")

# What `task` may be, besides 'denoising': the autoencoders that are trained as first stages.
AUTOENCODERS = {"vq": VQModel, "kl": AutoencoderKL}

# What `first_stage.kind` may be.
FIRST_STAGES = {"pixels": Pixels, "tokens": Tokens} | dict.fromkeys(AUTOENCODERS, Latents)

# Fields that the builder fills in from other sections.
DERIVED = {
    "UNet": ("out_channels", "text_dim", "learned_null", "dtype", "parent", "name"),
    "TokenTransformer": (
        *("num_codes", "grid", "num_steps", "text_dim"),
        *("learned_null", "dtype", "parent", "name"),
    ),
    "CategoricalProcess": ("num_codes",),
    "VQModel": ("out_channels", "dtype", "parent", "name"),
    "AutoencoderKL": ("out_channels", "dtype", "parent", "name"),
    **dict.fromkeys(("CLIPText", "T5Text", "BERTText"), ("dtype", "parent", "name")),
    "Latents": ("model",),
    "Tokens": ("model",),
    "ContextPrediction": ("num_steps", "alpha_bar", "dtype"),
}

# What a checkpoint's parameters depend on: a run cannot be resumed with any of these changed.
MODEL_KEYS = (
    "task",
    "data.image_size",
    "first_stage.kind",
    "first_stage.patch",
    "first_stage.scale",
    "first_stage.used_codes",
    "first_stage.autoencoder",
    "process",
    "model",
    "condition",
    "text.kind",
    "text.encoder",
    "text.vocabulary",
    "context.strides",
    "context.decoder",
    "context.source",
    "context.hidden",
    "context.latent",
    "autoencoder",
    "loss.codebook_decay",
    "loss.lpips_network",
    "loss.gan_weight",
    "loss.gan_channels",
    "loss.gan_layers",
    "seed",
)

# Where something is only there if the value is: a run can go on with another value, not without.
SWITCHES = ("context.weight", "text.weights", "loss.lpips_trunk")


def default() -> ConfigDict:
    """Every section and key, with defaults: a plain 64x64 pixel model with context prediction."""
    return _denoising(
        first_stage=pixels(),
        process=section(GaussianProcess),
        model=section(UNet, channels=128, channel_mult=(1, 2, 2), head_channels=32),
        sampling=section(GaussianSampling),
    )


def default_discrete(first_stage: ConfigDict) -> ConfigDict:
    """Every section and key of a discrete model, with VQ-Diffusion's process and optimiser.

    Args:
        first_stage: what `tokens` returns.
    """
    config = _denoising(
        first_stage=first_stage,
        process=section(CategoricalProcess),
        model=section(TokenTransformer, width=512, num_layers=20, num_heads=16),
        sampling=section(TokenSampling),
    )
    config.optimizer.update(b1=0.9, b2=0.96, weight_decay=0.045, clip_norm=0.5)
    return config


def _denoising(**sections: ConfigDict) -> ConfigDict:
    config = ConfigDict(
        {
            "task": "denoising",
            "seed": 0,
            "dtype": "float32",  # of activations: 'float32' or 'bfloat16'
            "data": section(DataSpec, name="openmoji/people"),
            **sections,
            "text": ConfigDict({"kind": "none"}),
            "condition": section(ConditionSpec),
            "context": section(ContextPrediction),
            "optimizer": section(OptimizerSpec),
            "train": section(TrainSpec),
            "mesh": section(MeshSpec),
        }
    )
    return config.lock()


def default_first_stage(kind: str) -> ConfigDict:
    """Every section and key of a first stage's training, with those of VQ-f4 and KL-f8.

    Args:
        kind: 'vq' or 'kl'.
    """
    published = {"kl": {"channel_mult": (1, 2, 4, 4), "latent_channels": 4}}
    config = ConfigDict(
        {
            "task": kind,
            "seed": 0,
            "dtype": "float32",
            "data": section(DataSpec, name="openmoji/people"),
            "autoencoder": section(AUTOENCODERS[kind], **published.get(kind, {})),
            "loss": section(FirstStageLoss),
            "optimizer": section(OptimizerSpec),
            "train": section(TrainSpec),
            "mesh": section(MeshSpec),
        }
    )
    return config.lock()


def section(cls: type, **values: Any) -> ConfigDict:
    """A section with the fields of a dataclass (or Flax module) as keys and its defaults.

    What may be None is a reference that knows its type: a command line cannot set it otherwise.
    """
    keys = {}
    for field in _fields(cls):
        keys[field.name] = values.pop(field.name, field.default)
        if keys[field.name] is dataclasses.MISSING:
            raise TypeError(f"section {cls.__name__} needs a value for {field.name}")
        if isinstance(field.type, types.UnionType):
            kind = field.type.__args__[0]  # of `kind | None`
            kind = tuple if typing.get_origin(kind) else kind
            keys[field.name] = FieldReference(keys[field.name], field_type=kind)
    assert not values, f"{cls.__name__} has no {', '.join(values)}"
    return ConfigDict(keys)


def pixels(patch: int = 1) -> ConfigDict:
    """A `first_stage` section: no codec but a rearrangement of pixels."""
    return ConfigDict({"kind": "pixels", **section(Pixels, patch=patch)})


def latents(kind: str, weights: str, scale: float | None = None, **architecture: Any) -> ConfigDict:
    """A `first_stage` section: the latents of a trained autoencoder.

    Args:
        kind: 'vq' or 'kl'.
        weights: where its parameters are, see `models.first_stage.Autoencoded`.
        scale: see there.
        **architecture: of the autoencoder; the defaults are those of VQ-f4.
    """
    return ConfigDict(
        {
            "kind": kind,
            "weights": weights,
            "scale": placeholder(float) if scale is None else scale,
            "autoencoder": section(AUTOENCODERS[kind], **architecture),
        }
    )


def tokens(weights: str, used_codes: int | None = None, **architecture: Any) -> ConfigDict:
    """A `first_stage` section: the codes of a trained VQ autoencoder.

    Args:
        weights: where its parameters are, see `models.first_stage.Autoencoded`.
        used_codes: see `models.first_stage.Tokens`.
        **architecture: of the autoencoder; the defaults are those of VQ-f4.
    """
    return ConfigDict(
        {
            "kind": "tokens",
            "weights": weights,
            "used_codes": placeholder(int) if used_codes is None else used_codes,
            "autoencoder": section(VQModel, **architecture),
        }
    )


def text(
    kind: str,
    *,
    weights: str = "",
    tokenizer: str = "",
    prompts: tuple[str, ...] = ("",),
    **architecture: Any,
) -> ConfigDict:
    """A `text` section: captions as a condition; see `train.text.TextCondition`.

    Args:
        kind: of the encoder: 'clip', 't5' or 'bert'.
        weights: see there.
        tokenizer: see there.
        prompts: see there.
        **architecture: of the encoder; the defaults are those of its published model.
    """
    return ConfigDict(
        {
            "kind": kind,
            "weights": weights,
            "tokenizer": tokenizer,
            "vocabulary": "",
            "prompts": prompts,
            "encoder": section(TEXT_ENCODERS[kind], **architecture),
        }
    )


def build(
    cls: type[T], config: ConfigDict, name: str, *, others: tuple[str, ...] = (), **derived: Any
) -> T:
    """Builds a section's object.

    Args:
        cls: dataclass or Flax module whose fields are the section's keys.
        config: the whole config.
        name: of the section; of a section in a section, both with a dot between them.
        others: keys of the section that are not fields of the class.
        **derived: fields that other sections decide.

    Raises:
        ConfigError: unknown key or a value that does not fit; the message names section and key.
    """
    known = [field.name for field in _fields(cls)]
    section = functools.reduce(operator.getitem, name.split("."), config)
    check_keys(section, [*others, *known], f"config.{name}")
    values = {key: _plain(value) for key, value in section.items() if key not in others}
    with naming(f"config.{name}"):
        return cls(**conform(cls, values), **derived)


def override(config: ConfigDict, path: str, text: str) -> Any:
    """Sets a key to what a text of the command line says, and returns its value.

    Args:
        config: the whole config, changed in place.
        path: of the key, such as 'model.channels'.
        text: the value; see `fields.parse`.

    Raises:
        ConfigError: there is no such key, or it cannot have such a value.
    """
    *outer, key = path.split(".")
    section, where = config, "config"
    for name in outer:
        _check_key(section, name, where)
        section, where = section[name], f"{where}.{name}"
        if not isinstance(section, ConfigDict):
            raise ConfigError(f"{where} is no section: it has the value {section!r}, and no keys")
    _check_key(section, key, where)
    if isinstance(section[key], ConfigDict):
        first = next(iter(section[key]), "key")
        raise ConfigError(f"{where}.{key} is a section: set its keys, as {where}.{key}.{first}=...")
    kind = _kinds(config, ".".join(outer)).get(key) or _kind_of(section[key])
    with naming(where), section.ignore_type():
        section[key] = parse(key, text, kind)
    return section[key]


def _check_key(section: ConfigDict, key: str, where: str) -> None:
    check_keys([key], list(section), where)


def _kind_of(value: Any) -> Any:
    """The type of a key that is no field of a class, by its value."""
    if isinstance(value, tuple | list):
        return tuple[type(value[0]) if value else str, ...]
    return str | None if value is None else type(value)


def _kinds(config: ConfigDict, path: str) -> dict[str, Any]:
    """Types of the keys of a section, where they are declared; see `fields.parse`."""
    if not path:
        return {"seed": random.SEEDS}
    cls = _classes(config).get(path)
    return {field.name: field.type for field in _fields(cls)} if cls else {}


def _classes(config: ConfigDict) -> dict[str, type]:
    """The class behind every section, by its path."""
    shared = {"data": DataSpec, "optimizer": OptimizerSpec, "train": TrainSpec, "mesh": MeshSpec}
    task = config.get("task")
    if task in AUTOENCODERS:
        return shared | {"autoencoder": AUTOENCODERS[task], "loss": FirstStageLoss}
    kind, text = config.first_stage.get("kind"), config.text.get("kind")
    discrete = kind == "tokens"
    return shared | {
        "first_stage": FIRST_STAGES.get(kind, Pixels),
        "first_stage.autoencoder": AUTOENCODERS.get(kind, VQModel),
        "process": CategoricalProcess if discrete else GaussianProcess,
        "model": TokenTransformer if discrete else UNet,
        "sampling": TokenSampling if discrete else GaussianSampling,
        "text.encoder": TEXT_ENCODERS.get(text, TEXT_ENCODERS["clip"]),
        "condition": ConditionSpec,
        "context": ContextPrediction,
    }


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Turns a ValueError or TypeError into a ConfigError that says where it happened."""
    try:
        yield
    except ConfigError:
        raise
    except FieldError as error:
        raise ConfigError(f"{where}.{error}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def check_keys(keys: Any, known: list[str], where: str) -> None:
    """Raises ConfigError for a key that is not known, naming the nearest one that is."""
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"{where} has no key {key!r}: {hint}it has {', '.join(known)}")


def differing_keys(config: dict, other: dict) -> list[str]:
    """Keys at which two configs, as plain dicts, differ in their parameters.

    They are `MODEL_KEYS`, keys below them, and `SWITCHES` that are on in one config only.
    """
    flat, other_flat = flatten(config), flatten(other)
    differing = [
        key
        for key in flat.keys() | other_flat.keys()
        if any(key == k or key.startswith(k + ".") for k in MODEL_KEYS)
        and flat.get(key) != other_flat.get(key)
    ]
    switched = [key for key in SWITCHES if bool(flat.get(key)) != bool(other_flat.get(key))]
    return sorted(differing + switched)


def _fields(cls: type) -> list[dataclasses.Field]:
    derived = DERIVED.get(cls.__name__, ())
    return [f for f in dataclasses.fields(cls) if f.init and f.name not in derived]


def _plain(value: Any) -> Any:
    """Lists as tuples, so that objects are hashable; nested sections as dicts."""
    if isinstance(value, list | tuple):
        return tuple(_plain(v) for v in value)
    return value.to_dict() if isinstance(value, ConfigDict) else value
