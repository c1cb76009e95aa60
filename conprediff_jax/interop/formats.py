"""The formats by name: those that `convert` writes, and those that it reads."""

import dataclasses
from collections.abc import Callable

from ml_collections import ConfigDict

from conprediff_jax.common import hub
from conprediff_jax.common.errors import FieldError, UserError
from conprediff_jax.config.vocabulary import make_text
from conprediff_jax.data import Tokenizer
from conprediff_jax.interop import model_card, pretrained, safetensors_folder, stablehlo
from conprediff_jax.interop.diffusers import first_stage as diffusers_first_stage
from conprediff_jax.interop.diffusers import pipeline as diffusers_pipeline
from conprediff_jax.interop.original import adm, dit, ldm, published, vq_diffusion
from conprediff_jax.interop.pretrained import Pretrained
from conprediff_jax.runs.restore import Restored

WRITTEN = ("inference", "safetensors", "diffusers", "stablehlo")
READ = ("diffusers", "safetensors", *dit.FAMILIES, *published.MODELS)

_SELF_DESCRIBED = {"diffusers": diffusers_pipeline.read, "safetensors": safetensors_folder.read}


def write(
    model: Pretrained,
    to: str,
    out: str,
    *,
    name: str | None = None,
    metrics: str | None = None,
    license: str | None = None,
) -> None:
    """Writes a model with its card. Either the whole folder appears, or nothing.

    Args:
        model: The model.
        to: The format, one of `WRITTEN`.
        out: The folder, which must be new or empty.
        name: How the card calls the folder; by default `out`.
        metrics: The `metrics.json` of an evaluation, whose figures the card quotes.
        license: The identifier of the license that the card states; None for no statement.

    Raises:
        UserError: The format cannot hold the model, or there is something at `out`.
    """
    kind = diffusers_pipeline.pipeline_of(model) if to == "diffusers" else to
    with pretrained.new_folder(out) as folder:
        match to:
            case "inference":
                pretrained.write_folder(model, folder)
            case "safetensors":
                safetensors_folder.write(model, folder)
            case "diffusers":
                diffusers_pipeline.write(model, folder)
            case _:
                stablehlo.write(model, folder, model.diffusion.sampling)
        pretrained.write_config(model, folder, tokenizer=to != "diffusers")
        model_card.write(
            model, folder, kind=kind, name=name or out, metrics=metrics, license=license
        )


def write_first_stage(
    run: Restored, to: str, out: str, *, name: str | None = None, license: str | None = None
) -> None:
    """Writes the first stage of a run with its card. Either the whole folder appears, or nothing.

    Args:
        run: A run that trained a first stage.
        to: The format, which must be 'diffusers'.
        out: The folder, which must be new or empty.
        name: How the card calls the folder; by default `out`.
        license: The identifier of the license that the card states; None for no statement.

    Raises:
        UserError: The format cannot hold a first stage, or there is something at `out`.
    """
    if to != "diffusers":
        raise FieldError("to", f"is {to}: a first stage is written as 'diffusers' only")
    with pretrained.new_folder(out) as folder:
        diffusers_first_stage.write(run, folder, name=name or out, license=license)


def read(
    path: str,
    family: str,
    *,
    name: str | None = None,
    config: ConfigDict | None = None,
    new_attention_order: bool | None = None,
    tokenizer: str | None = None,
    first_stage: str | None = None,
) -> Pretrained:
    """Reads a published checkpoint, or a folder that `write` wrote.

    Files of other projects do not describe their networks. They need either a name or a config. The
    files of DiT and SiT need neither, since their shapes tell which published model they hold.

    Args:
        path: The file or folder, or its address on the Hub.
        family: The format, one of `READ`.
        name: The name of a published model of the family.
        config: A config that describes the model.
        new_attention_order: ADM's option of that name; None takes the option of the named model.
        tokenizer: The file or folder of a tokenizer, where the model reads captions.
        first_stage: The workdir or diffusers folder of the first stage, where the file holds none.

    Raises:
        UserError: The file does not fit the model, or the arguments do not fit the format.
    """
    if first_stage is not None and family not in dit.FAMILIES:
        raise FieldError("first_stage", f"is {first_stage}: models of {family} have their own")
    if hub.is_hub(path):
        there = hub.local(path)
        model = read(
            there,
            family,
            name=name,
            config=config,
            new_attention_order=new_attention_order,
            tokenizer=tokenizer,
            first_stage=first_stage,
        )
        return _from_hub(model, there, path)
    if family in _SELF_DESCRIBED:
        if (name, config, tokenizer) != (None, None, None):
            raise UserError(
                f"{path}: {family} folders describe their model; give no model, config or tokenizer"
            )
        return _SELF_DESCRIBED[family](path)
    if family in dit.FAMILIES:
        if (name, tokenizer) != (None, None):
            raise UserError(
                f"{path}: the shapes in files of {family} tell their model, and it reads no "
                "captions; give no model or tokenizer"
            )
        return dit.read(path, family, first_stage=first_stage, config=config)
    if (name is None) == (config is None):
        raise UserError(
            f"{path}: files of {family} do not describe their networks; give either a model, one "
            f"of {', '.join(published.MODELS[family])}, or a config"
        )
    if config is None:
        config = published.config(family, name)
    config = _with_tokenizer(config, family, tokenizer)
    if new_attention_order is None:
        new_attention_order = published.new_attention_order(family, name)
    readers: dict[str, Callable[[], Pretrained]] = {
        "ldm": lambda: ldm.read(path, config),
        "adm": lambda: adm.read(path, config, new_attention_order=new_attention_order),
        "vq-diffusion": lambda: vq_diffusion.read(path, config),
    }
    return readers[family]()


def _from_hub(model: Pretrained, there: str, address: str) -> Pretrained:
    """The model with addresses in its config where it has places in the cache of the Hub."""
    config = ConfigDict(model.config.to_dict())
    for section, key in (("first_stage", "weights"), ("text", "weights"), ("text", "tokenizer")):
        place = (config.get(section) or {}).get(key) or ""
        if place.startswith(f"{there}/"):
            config[section][key] = hub.joined(address, place.removeprefix(f"{there}/"))
    return dataclasses.replace(model, config=config.lock(), origin=address)


def _with_tokenizer(config: ConfigDict, family: str, path: str | None) -> ConfigDict:
    """The config with the tokenizer's vocabulary, which files of other projects do not hold."""
    text = make_text(config)
    if text is None or text.vocabulary:
        if path:
            raise FieldError(
                "tokenizer",
                f"is {path}: the model reads no captions, or has a tokenizer already",
            )
        return config
    path = path or text.tokenizer
    if not path:
        raise UserError(
            "the model reads captions, and its file holds no tokenizer: give a tokenizer, a folder "
            "with tokenizer.json, vocab.txt, or vocab.json and merges.txt"
        )
    pad = vq_diffusion.PAD if family == "vq-diffusion" else None
    tokenizer = Tokenizer.from_file(path, length=text.encoder.length, pad=pad)
    config = ConfigDict(config.to_dict())
    config.text.update(tokenizer=path, vocabulary=tokenizer.to_json())
    return config.lock()
