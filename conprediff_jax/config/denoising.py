"""Configs of diffusion models: their sections, and the task that they describe.

`default()`, `default_discrete()` and `default_masked()` return configs with all keys and the
defaults of the sections' classes. A config file starts from one of them and changes what it needs.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from conprediff_jax.common.errors import ConfigError
from conprediff_jax.config.sections import (
    TASKS,
    TaskKind,
    build,
    build_kind,
    naming,
    section,
    whole,
    with_defaults,
)
from conprediff_jax.data import DataSpec
from conprediff_jax.diffusion import PROCESSES
from conprediff_jax.diffusion.categorical import CategoricalProcess
from conprediff_jax.diffusion.gaussian import GaussianProcess
from conprediff_jax.diffusion.masked import MaskedProcess
from conprediff_jax.models import DENOISERS, FIRST_STAGES, Denoiser, FirstStage
from conprediff_jax.models.denoiser import check_taps
from conprediff_jax.models.first_stage import Latents, Palette, Pixels
from conprediff_jax.models.text import TEXT_ENCODERS
from conprediff_jax.models.transformer import TokenTransformer
from conprediff_jax.models.unet import UNet
from conprediff_jax.objectives import TERMS, ContextTerm, Term
from conprediff_jax.sampling.model import ConditionSpec, DiffusionModel
from conprediff_jax.sampling.spec import (
    SAMPLINGS,
    GaussianSampling,
    MaskedSampling,
    TokenSampling,
)
from conprediff_jax.sampling.text import TextCondition
from conprediff_jax.tasks.denoising import CONTEXT, DENOISE, Denoising
from conprediff_jax.tasks.spec import TrainSpec

TASK = "denoising"

# The context loss of version 0.1.0, whose checkpoints may lack these keys.
_FIRST_CONTEXT = {"weight": 1.0, "warmup_steps": 0}


def default() -> ConfigDict:
    """A config with all keys: a model of 64 x 64 pixels with context prediction."""
    return _default(
        first_stage=pixels(),
        process=section(GaussianProcess, kind="gaussian"),
        model=section(UNet, kind="unet", channels=128, channel_mult=(1, 2, 2), head_channels=32),
        sampling=section(GaussianSampling),
    )


def default_discrete(first_stage: ConfigDict) -> ConfigDict:
    """A config with all keys of a discrete model, with VQ-Diffusion's process and optimiser.

    Args:
        first_stage: A section that `tokens` or `palette` returns.
    """
    transformer = {"width": 512, "num_layers": 20, "num_heads": 16}
    config = _default(
        first_stage=first_stage,
        process=section(CategoricalProcess, kind="mask_and_replace"),
        model=section(TokenTransformer, kind="token_transformer", **transformer),
        sampling=section(TokenSampling),
    )
    config.optimizer.update(b1=0.9, b2=0.96, weight_decay=0.045, clip_norm=0.5)
    config.context.weight = 0.3  # of a loss in nats per token
    return config


def default_masked(first_stage: ConfigDict) -> ConfigDict:
    """A config with all keys of masked diffusion, with the optimiser of `default_discrete`.

    Args:
        first_stage: A section that `tokens` or `palette` returns.
    """
    config = default_discrete(first_stage).unlock()
    config.process = section(MaskedProcess, kind="masked")
    config.sampling = section(MaskedSampling)
    return config.lock()


def _default(**sections: ConfigDict) -> ConfigDict:
    return whole(
        TASK,
        **sections,
        text=ConfigDict({"kind": "none"}),
        condition=section(ConditionSpec),
        context=section(ContextTerm),
        terms=ConfigDict(),
    )


def pixels(patch: int = 1) -> ConfigDict:
    """A `first_stage` section without autoencoder: points are patches of pixels.

    Args:
        patch: Side of a patch, in pixels.
    """
    return section(Pixels, kind="pixels", patch=patch)


def latents(kind: str, weights: str, scale: float | None = None, **architecture: Any) -> ConfigDict:
    """A `first_stage` section: the latents of a trained autoencoder.

    Args:
        kind: 'vq' or 'kl'.
        weights: Path of its parameters; see `models.first_stage.Autoencoded`.
        scale: The factor that latents are multiplied by; None to measure it.
        **architecture: Keys of the autoencoder; the defaults are those of VQ-f4.
    """
    return _autoencoded(
        kind, weights, architecture, scale=placeholder(float) if scale is None else scale
    )


def tokens(weights: str, used_codes: int | None = None, **architecture: Any) -> ConfigDict:
    """A `first_stage` section: the codes of a trained VQ autoencoder.

    Args:
        weights: Path of its parameters; see `models.first_stage.Autoencoded`.
        used_codes: Number of codes to keep, see `models.first_stage.Tokens`; None for all.
        **architecture: Keys of the autoencoder; the defaults are those of VQ-f4.
    """
    kept = placeholder(int) if used_codes is None else used_codes
    return _autoencoded("tokens", weights, architecture, used_codes=kept)


def palette(num_codes: int) -> ConfigDict:
    """A `first_stage` section for tokens that the data hold, one a pixel.

    Args:
        num_codes: Number of tokens; see `models.first_stage.Palette`.
    """
    return section(Palette, kind="palette", num_codes=num_codes)


def _autoencoded(
    kind: str, weights: str, architecture: dict[str, Any], **values: Any
) -> ConfigDict:
    autoencoder = section(FIRST_STAGES[kind].autoencoder, **architecture)
    return ConfigDict({"kind": kind, "weights": weights, **values, "autoencoder": autoencoder})


def text(
    kind: str,
    *,
    weights: str = "",
    tokenizer: str = "",
    prompts: tuple[str, ...] = ("",),
    **architecture: Any,
) -> ConfigDict:
    """A `text` section, for a model with captions as its condition.

    Args:
        kind: Kind of the encoder: 'clip', 't5' or 'bert'.
        weights: Folder of the encoder's weights; see `sampling.text.TextCondition`.
        tokenizer: File or folder of the tokenizer; see `sampling.text.TextCondition`.
        prompts: Captions of the sample grids; see `sampling.text.TextCondition`.
        **architecture: Keys of the encoder; the defaults are those of its published model.
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


def term(kind: str, **values: Any) -> ConfigDict:
    """A section of `config.terms`: a further term of the loss, beside `config.context`.

    Args:
        kind: Kind of the term, such as 'own_point'; see `objectives.TERMS`.
        **values: Keys of the term; the others have the defaults of its class.
    """
    return section(TERMS[kind], kind=kind, **values)


def classes(config: ConfigDict) -> dict[str, type]:
    """The class of every section of a denoiser's config; see `TaskKind`."""
    with naming("config.first_stage"):
        first_stage = FIRST_STAGES[config.first_stage.get("kind")]
    with naming("config.process"):
        process = PROCESSES[config.process.get("kind")]
        sampling = SAMPLINGS[config.process.kind]
    with naming("config.model"):
        model = DENOISERS[config.model.get("kind")]
    found = {
        "first_stage": first_stage.first_stage,
        "process": process,
        "model": model,
        "sampling": sampling,
        "condition": ConditionSpec,
        "context": ContextTerm,
    }
    for name in config.get("terms", {}):
        with naming(f"config.terms.{name}"):
            found[f"terms.{name}"] = TERMS[config.terms[name].get("kind")]
    if first_stage.autoencoder:
        found["first_stage.autoencoder"] = first_stage.autoencoder
    if encoder := _text_encoder_class(config):
        found |= {"text": TextCondition, "text.encoder": encoder}
    return found


def _text_encoder_class(config: ConfigDict) -> type | None:
    """The class of `config.text.encoder`; None if the model reads no captions."""
    kind = config.text.get("kind")
    if kind == "none":
        return None
    if kind not in TEXT_ENCODERS:
        raise ConfigError(f"config.text.kind is {kind!r}: choose one of {('none', *TEXT_ENCODERS)}")
    if "encoder" not in config.text:
        raise ConfigError(
            f"config.text.kind is {kind!r}, and there is no key 'encoder': the config file has to "
            f"say config.text = conprediff_jax.config.text({kind!r}, ...)"
        )
    return TEXT_ENCODERS[kind]


def make_text(config: ConfigDict) -> TextCondition | None:
    """Builds the `text` section; None if its kind is 'none'.

    Raises:
        ConfigError: A key has a wrong value.
    """
    cls = _text_encoder_class(config)
    if cls is None:
        return None
    encoder = build(cls, config, "text.encoder", dtype=config.dtype)
    return build(TextCondition, config, "text", others=("kind", "encoder"), encoder=encoder)


def make_model(config: ConfigDict, data: DataSpec) -> DiffusionModel:
    """The diffusion model that a config describes.

    Raises:
        ConfigError: One line that names the key at fault.
    """
    first_stage = _make_first_stage(config, data.channels)
    with naming("config.first_stage"):
        point_shape = first_stage.point_shape(data.image_size)
    _check_points(config, first_stage)
    condition = build(ConditionSpec, config, "condition")
    text = make_text(config)
    _check_condition(config, condition, text)
    derived = {
        "out_channels": point_shape[-1],
        "grid": point_shape[:2],
        "num_codes": first_stage.num_codes if first_stage.discrete else None,
        "text_dim": text.encoder.width if text else None,
        "learned_null": condition.learned_null,
        "dtype": config.dtype,
    }
    process = build_kind(PROCESSES, config, "process", **derived)
    num_steps = getattr(process, "num_steps", None)  # None for continuous time
    denoiser = build_kind(DENOISERS, config, "model", num_steps=num_steps, **derived)
    _check_size(config, data, first_stage, denoiser)
    with naming("config.process"):
        sampling = SAMPLINGS[config.process.kind]
    model = DiffusionModel(
        first_stage=first_stage,
        process=process,
        denoiser=denoiser,
        point_shape=point_shape,
        condition=condition,
        text=text,
        sampling=build(sampling, config, "sampling"),
    )
    with naming("config.sampling"):
        model.check_sampling(model.sampling)
    return model


def _make_first_stage(config: ConfigDict, channels: int) -> FirstStage:
    """The frozen codec of a diffusion model, for images of a number of channels."""
    with naming("config.first_stage"):
        first_stage, autoencoder = FIRST_STAGES[config.first_stage.get("kind")]
    if autoencoder is None:
        return build(first_stage, config, "first_stage", others=("kind",), channels=channels)
    # float32, whatever dtype the denoiser has: latents are encoded once and used many times.
    model = build(
        autoencoder, config, "first_stage.autoencoder", dtype="float32", out_channels=channels
    )
    return build(first_stage, config, "first_stage", others=("kind", "autoencoder"), model=model)


def _check_points(config: ConfigDict, first_stage: FirstStage) -> None:
    """Checks that process and denoiser are for the points of the first stage."""
    for name, registry in {"process": PROCESSES, "model": DENOISERS}.items():
        with naming(f"config.{name}"):
            kind = registry[config[name].get("kind")]
        if kind.discrete != first_stage.discrete:
            points = "tokens" if first_stage.discrete else "vectors"
            raise ConfigError(
                f"config.{name}.kind is {config[name].kind!r}, which is not for {points}: those "
                f"are the points of config.first_stage.kind {config.first_stage.kind!r}"
            )


def _check_condition(
    config: ConfigDict, condition: ConditionSpec, text: TextCondition | None
) -> None:
    """Checks that labels, captions and the null condition fit together."""
    labelled = config.model.get("num_classes")
    if condition.dropout and not (text or labelled):
        raise ConfigError(
            f"config.condition.dropout is {condition.dropout}: there is no condition to drop, "
            "config.model.num_classes is None and config.text.kind 'none'"
        )
    if text and labelled:
        raise ConfigError(
            f"config.text.kind is {config.text.kind!r}: config.model.num_classes must be None, a "
            "model has one condition"
        )
    if condition.null == "empty" and not text:
        raise ConfigError("config.condition.null is 'empty': only captions can be empty")


def _check_size(
    config: ConfigDict, data: DataSpec, first_stage: FirstStage, denoiser: Denoiser
) -> None:
    """Checks that the first stage and the denoiser can divide all sizes of images."""
    factor = denoiser.downsampling
    if factor is None and data.aspect_step:
        raise ConfigError(
            f"config.data.aspect_step is {data.aspect_step}: config.model.kind "
            f"{config.model.kind!r} takes images of one shape"
        )
    unit = first_stage.downsampling * (factor or 1)
    said = f"{unit}, {first_stage.downsampling} (first stage) x {factor} (denoiser)"
    for shape in data.shapes if factor else ():
        if any(side % unit for side in shape):
            key, value = "image_size", config.data.image_size
            if shape != data.image_shape[:2]:
                key, value = "aspect_step", data.aspect_step
            raise ConfigError(f"config.data.{key} is {value}: it must be a multiple of {said}")


def make_task(config: ConfigDict, data: DataSpec, train: TrainSpec) -> Denoising:
    """The training of a diffusion model, with the terms whose weight is not 0."""
    model = make_model(config, data)
    if data.latents and not isinstance(model.first_stage, Latents):
        raise ConfigError(
            f"config.data.latents is {data.latents!r}: only a denoiser with a trained first stage "
            "(config.first_stage.kind 'vq' or 'kl') reads latents"
        )
    if data.encoded_text and not (model.text and model.text.has_fixed_weights):
        raise ConfigError(
            "config.data.encoded_text is True: only a frozen text encoder (config.text.weights) "
            "can encode captions ahead of time"
        )
    return Denoising(
        seed=config.seed,
        model=model,
        terms=_make_terms(config, model, data, train),
        microbatches=train.microbatches,
        latents=data.latents,
        encoded_text=bool(data.latents) and data.encoded_text,
    )


def _make_terms(
    config: ConfigDict, model: DiffusionModel, data: DataSpec, train: TrainSpec
) -> dict[str, Term]:
    """The terms of the loss by name, without those of weight 0."""
    derived = {
        "share": model.process.share,
        "alpha_bar": model.process.alpha_bar,
        "dtype": config.dtype,
        "steps": train.steps,
        "num_codes": model.first_stage.num_codes if model.first_stage.discrete else None,
    }
    terms = {CONTEXT: build(ContextTerm, config, CONTEXT, **derived)}
    for name in config.terms:
        if name in ("denoiser", CONTEXT, DENOISE):
            raise ConfigError(f"config.terms has {name!r}: this name is taken, choose another one")
        terms[name] = build_kind(TERMS, config, f"terms.{name}", **derived)
    terms = {name: built for name, built in terms.items() if built.weight}
    for name, built in terms.items():
        with naming(f"config.{name}" if name == CONTEXT else f"config.terms.{name}"):
            check_taps(model.denoiser, built.taps)
        if built.reads_encoded and not (data.latents and data.features):
            raise ConfigError(
                f"config.terms.{name} reads features: config.data.latents and config.data.features "
                "must name a folder of latents with features, see docs/terms.md"
            )
    return terms


def completed(config: ConfigDict) -> ConfigDict:
    """The config, with the sections and kinds that checkpoints of older versions do not have."""
    context = {**default().context, **_FIRST_CONTEXT, **config.get("context", {})}
    config = with_defaults(config, default())
    if config.model.get("kind") == "dit" and "tap" in config.model:  # which DiT had once
        if block := config.model.tap:
            context |= {"tap": (f"block_{block}",), "coarse_tap": "spread"}
        config.model = ConfigDict({k: v for k, v in config.model.items() if k != "tap"})
    config.context = ConfigDict(context)
    discrete = config.first_stage.get("kind") == "tokens"
    for name, kind in {
        "process": "mask_and_replace" if discrete else "gaussian",
        "model": "token_transformer" if discrete else "unet",
    }.items():
        if "kind" not in config[name]:
            config[name] = ConfigDict({"kind": kind, **config[name]})
    return config


TASKS.register(TASK)(TaskKind(completed, classes, make_task, {"terms": TERMS}))
