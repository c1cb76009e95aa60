"""The formats by name: what `convert` writes, and what it reads."""

from collections.abc import Callable

from ml_collections import ConfigDict

from conprediff_jax.common.errors import UserError
from conprediff_jax.config.vocabulary import make_text
from conprediff_jax.data import Tokenizer
from conprediff_jax.interop import model_card, pretrained, safetensors_folder, stablehlo
from conprediff_jax.interop.diffusers import pipeline as diffusers_pipeline
from conprediff_jax.interop.original import adm, ldm, published, vq_diffusion
from conprediff_jax.interop.pretrained import Pretrained

WRITTEN = ("inference", "safetensors", "diffusers", "stablehlo")
READ = ("diffusers", "safetensors", *published.MODELS)

_DESCRIBED = {"diffusers": diffusers_pipeline.read, "safetensors": safetensors_folder.read}


def write(model: Pretrained, to: str, out: str, *, metrics: str | None = None) -> None:
    """Writes a model with its card; either all of the folder appears, or none.

    Args:
        model: what to write.
        to: a format of `WRITTEN`.
        out: the folder, which must not exist.
        metrics: `metrics.json` of an evaluation, for the card.

    Raises:
        UserError: the format cannot hold the model, or there is something at `out`.
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
        model_card.write(model, folder, kind=kind, name=out, metrics=metrics)


def read(
    path: str,
    family: str,
    *,
    name: str | None = None,
    config: ConfigDict | None = None,
    new_attention_order: bool | None = None,
    tokenizer: str | None = None,
) -> Pretrained:
    """Reads a published checkpoint, or what `write` wrote.

    Args:
        path: File or folder.
        family: Of `READ`.
        name: For files that do not say what they hold, a published model of the family; or else
        config: a config that describes it.
        new_attention_order: Of a model of ADM that is described by a config.
        tokenizer: File or folder of the tokenizer, for files of models that read captions.

    Raises:
        UserError: The file does not fit, or nothing (or too much) says what it holds.
    """
    if family in _DESCRIBED:
        if (name, config, tokenizer) != (None, None, None):
            raise UserError(
                f"--from={family} says itself what it holds: no --model, --config or --tokenizer"
            )
        return _DESCRIBED[family](path)
    if (name is None) == (config is None):
        raise UserError(
            f"--from={family} does not say what it holds: give --model, one of "
            f"{', '.join(published.MODELS[family])}, or a --config"
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


def _with_tokenizer(config: ConfigDict, family: str, path: str | None) -> ConfigDict:
    """The config with the vocabulary of its captions, which original files do not hold."""
    text = make_text(config)
    if text is None or text.vocabulary:
        if path:
            raise UserError(f"--tokenizer={path}: the model reads no captions, or knows its own")
        return config
    path = path or text.tokenizer
    if not path:
        raise UserError(
            f"--from={family}: the model reads captions, and its file holds no tokenizer: give "
            "--tokenizer, a folder with tokenizer.json, vocab.txt, or vocab.json and merges.txt"
        )
    pad = vq_diffusion.PAD if family == "vq-diffusion" else None
    tokenizer = Tokenizer.from_file(path, length=text.encoder.length, pad=pad)
    config = ConfigDict(config.to_dict())
    config.text.update(tokenizer=path, vocabulary=tokenizer.to_json())
    return config.lock()
