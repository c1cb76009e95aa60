"""Exports checkpoints to other formats, and imports published checkpoints.

    python -m conprediff_jax.convert export --workdir=runs/celebahq --to=diffusers --out=pipeline
    python -m conprediff_jax.convert export --workdir=runs/openmoji --to=inference --out=model
    python -m conprediff_jax.convert import model.ckpt --from=ldm --model=celebahq --out=celebahq
    python -m conprediff_jax.convert export --workdir=runs/imagenet --average=0.15 --to=inference
        --out=averaged

`export` writes the moving average of the denoiser, the first stage, the schedule, `config.json` and
a model card, `README.md`. For models that read captions, it also writes the text encoder and the
tokenizer. It leaves out the context decoder. With `--average`, it writes a power-function average
in place of the moving average; docs/averages.md says which ones a run allows. `--to` names the
format:

    inference     a small folder that sample, evaluate and `conprediff_jax.load` open as a workdir
    safetensors   one file for each network, with the parameter names of this package
    diffusers     the folder of a diffusers pipeline; see interop/diffusers/pipeline.py
    stablehlo     the whole sampler as one program for CPU, CUDA and TPU, for any number of images

The run of a first stage is exported as the folder of diffusers' `AutoencoderKL` or `VQModel`, with
`--to=diffusers`. `config.first_stage.weights` takes this folder, too.

`import` reads a published checkpoint, or a folder that `export` wrote, and writes an `inference`
folder. You can sample from this folder, or start training from it with
`--config.train.init_from=<folder>`. Files that do not describe their model need `--model`, a name
in interop/original/published.py, or `--config`. If the model reads captions, they also need
`--tokenizer`. Files of DiT and SiT describe their model, and need `--first_stage`.

Both write to `--out`, upload to the Hugging Face Hub with `--push`, or both:

    python -m conprediff_jax.convert export --workdir=runs/openmoji --to=inference
        --push=hf://owner/name --license=apache-2.0

Wherever a command takes a path of weights, it takes such an address, too: `hf://owner/name`, with
`/folder` and `@revision` behind it where they are needed.

The flags of sampling, such as `--sampler` and `--steps`, set the sampling defaults of the written
model.
"""

import pathlib
import tempfile

from absl import flags

from conprediff_jax.cli import config_flag, help, sampling_flags
from conprediff_jax.cli.choices import READ, WRITTEN

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "export: Read the model from this workdir of a training run, or `inference` folder.",
)
_STEP = flags.DEFINE_integer(
    "step", None, "export: Use the checkpoint of this training step; the default is the newest."
)
_AVERAGE = flags.DEFINE_float(
    "average",
    None,
    "export: Write the power-function average of this relative deviation, made from those that the "
    "run stored (config.train.power_averages); the default is the moving average.",
)
_TO = flags.DEFINE_enum("to", None, WRITTEN, "export: Write this format.")
_METRICS = flags.DEFINE_string(
    "metrics",
    None,
    "export: Quote the figures that this metrics.json has of the exported step and parameters in "
    "the model card; the default is <workdir>/evaluation/metrics.json, if it exists.",
)
_FROM = flags.DEFINE_enum(
    "from", None, READ, "import: Read a checkpoint of this family of formats."
)
_MODEL = flags.DEFINE_string(
    "model", None, "import: The checkpoint is this published model of the family."
)
_CONFIG = config_flag.define(
    help_string="import: This config file describes the model, in place of --model."
)
_NEW_ATTENTION = flags.DEFINE_bool(
    "new_attention_order",
    None,
    "import --from=adm: The model has the new attention order; --model makes this flag needless.",
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    None,
    "import: Read the tokenizer from this file or folder; original files of models that read "
    "captions need it.",
)
_FIRST_STAGE = flags.DEFINE_string(
    "first_stage",
    None,
    "import --from=dit or --from=sit: Read the weights of the first stage from this folder, a "
    "diffusers AutoencoderKL or a workdir.",
)
_OUT = flags.DEFINE_string("out", None, "Write to this folder; it must not exist.")
_PUSH = flags.DEFINE_string(
    "push",
    None,
    "Upload to this address on the Hugging Face Hub, hf://owner/name, with the token of HF_TOKEN "
    "or of `hf auth login`.",
)
_PRIVATE = flags.DEFINE_bool(
    "private", False, "--push: If there is no such repository, make it a private one."
)
_LICENSE = flags.DEFINE_string(
    "license", None, "State this license in the model card, by its identifier on the Hub."
)
flags.adopt_module_key_flags(sampling_flags)  # so that --help shows them

help.answer(__name__)  # before imports that take seconds

from absl import logging

from conprediff_jax.cli import app
from conprediff_jax.common import hub, opening
from conprediff_jax.common.errors import UserError
from conprediff_jax.interop import formats, model_card, pretrained
from conprediff_jax.tasks.first_stage import FirstStageTraining


def main(argv: list[str]) -> None:
    """Reads the flags, and imports or exports."""
    if not _OUT.value and not _PUSH.value:
        raise UserError("give --out, the folder to write to, or --push, an address on the Hub")
    if _OUT.value:
        pretrained.check_new(_OUT.value)
    if not _PUSH.value:
        _convert(argv[1:], _OUT.value)
        return
    hub.check_push(_PUSH.value)
    with tempfile.TemporaryDirectory() as folder:
        out = _OUT.value or str(pathlib.Path(folder) / "model")
        message = _convert(argv[1:], out)
        made = pathlib.Path(out).expanduser()
        url = hub.push(made, _PUSH.value, message=message, private=_PRIVATE.value)
    logging.info("uploaded as %s", url)


def _convert(arguments: list[str], out: str) -> str:
    """Writes a folder, and returns in a sentence what it is."""
    command, *paths = arguments or [""]
    place = _OUT.value or _PUSH.value
    if command == "export" and not paths:
        for flag in (_WORKDIR, _TO):
            if not flag.value:
                raise UserError(f"export needs --{flag.name}")
        source, to = _WORKDIR.value, _TO.value
        opening.say(source, f"a model in the format {to}", place, on=None)
        run = pretrained.open_run(source, _STEP.value, _AVERAGE.value)
        if isinstance(run.task, FirstStageTraining):
            formats.write_first_stage(run, to, out, name=_name(to), license=_LICENSE.value)
            return _said(run.step, source, to)
        model = pretrained.of_run(run, source)
    elif command == "import" and len(paths) == 1:
        if not _FROM.value:
            raise UserError("import needs --from")
        source, to = paths[0], "inference"
        opening.say(source, f"a model in the format {to}", place, on=None)
        model = formats.read(
            source,
            _FROM.value,
            name=_MODEL.value,
            config=_CONFIG.value,
            new_attention_order=_NEW_ATTENTION.value,
            tokenizer=_TOKENIZER.value,
            first_stage=_FIRST_STAGE.value,
        )
    else:
        raise UserError("give either export --workdir=... --to=..., or import PATH --from=...")
    model = model.resampled(**sampling_flags.values())
    card = {"name": _name(to), "metrics": _metrics(model), "license": _LICENSE.value}
    formats.write(model, to, out, **card)
    return _said(model.step, source, to)


def _said(step: int, source: str, to: str) -> str:
    """Logs what was written, and returns the message of its commit."""
    logging.info("step %d of %s written as %s to %s", step, source, to, _OUT.value or _PUSH.value)
    return f"Step {step} as {to}"


def _name(to: str) -> str | None:
    """How the card calls the folder: as the library that opens it does, if it is uploaded."""
    if not _PUSH.value or to == "stablehlo":  # which is opened as files
        return _OUT.value
    address = hub.parse(_PUSH.value)
    return address.repo if to == "diffusers" and not address.path else _PUSH.value


def _metrics(model: pretrained.Pretrained) -> str | None:
    """The file of evaluations that the model card quotes; None if it has none of this model."""
    if _METRICS.value or not _WORKDIR.value:
        return _METRICS.value
    found = pathlib.Path(_WORKDIR.value) / "evaluation" / "metrics.json"
    return str(found) if found.exists() and model_card.own_rows(found, model) else None


if __name__ == "__main__":
    app.run(main, positional=2)
