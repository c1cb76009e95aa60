"""The formats by name: what `convert` writes, and what it reads."""

from collections.abc import Callable

from ml_collections import ConfigDict

from conprediff_jax.errors import UserError
from conprediff_jax.interop import (
    adm,
    diffusers_pipeline,
    ldm,
    model_card,
    pretrained,
    published,
    safetensors_folder,
    stablehlo,
    vq_diffusion,
)
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
                stablehlo.write(model, folder, model.task.sampling)
        pretrained.write_config(model, folder)
        model_card.write(model, folder, kind=kind, name=out, metrics=metrics)


def read(
    path: str,
    family: str,
    *,
    name: str | None = None,
    config: ConfigDict | None = None,
    new_attention_order: bool | None = None,
) -> Pretrained:
    """Reads a published checkpoint, or what `write` wrote.

    Args:
        path: File or folder.
        family: Of `READ`.
        name: For files that do not say what they hold, a published model of the family; or else
        config: a config that describes it.
        new_attention_order: Of a model of ADM that is described by a config.

    Raises:
        UserError: The file does not fit, or nothing (or too much) says what it holds.
    """
    if family in _DESCRIBED:
        if name is not None or config is not None:
            raise UserError(f"--from={family} says itself what it holds: no --model, no --config")
        return _DESCRIBED[family](path)
    if (name is None) == (config is None):
        raise UserError(
            f"--from={family} does not say what it holds: give --model, one of "
            f"{', '.join(published.MODELS[family])}, or a --config"
        )
    if config is None:
        config = published.config(family, name)
    if new_attention_order is None:
        new_attention_order = published.new_attention_order(family, name)
    readers: dict[str, Callable[[], Pretrained]] = {
        "ldm": lambda: ldm.read(path, config),
        "adm": lambda: adm.read(path, config, new_attention_order=new_attention_order),
        "vq-diffusion": lambda: vq_diffusion.read(path, config),
    }
    return readers[family]()
