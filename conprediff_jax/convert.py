"""Checkpoints in and out.

    python -m conprediff_jax.convert export --workdir=runs/celebahq --to=diffusers --out=pipeline
    python -m conprediff_jax.convert import model.ckpt --from=ldm --model=celebahq --out=celebahq

`export` writes the moving average of the denoiser, without the context decoder, with first stage,
schedule, `config.json` and a model card, `README.md`; of models that read captions with text
encoder and tokenizer too:

    inference     a small folder that sample, evaluate and `conprediff_jax.load` open as a workdir
    safetensors   one file a network, by our names
    diffusers     the folder of a pipeline, see interop/diffusers_pipeline.py
    stablehlo     the whole sampler as one program for CPU, CUDA and TPU, of any number of images

`import` reads a published checkpoint, or what `export` wrote, and writes an `inference` folder. It
can be sampled from, and training can start from it: `--config.train.init_from=<folder>`. Files that
do not say what they hold need `--model`, a name of interop/published.py, or `--config`; and
`--tokenizer` where the model reads captions.

Flags of sampling, such as `--sampler` and `--steps`, go into what is written.
"""

import pathlib

from absl import flags, logging

from conprediff_jax.cli import app, config_flag, sampling_flags
from conprediff_jax.common.errors import UserError
from conprediff_jax.interop import formats, pretrained

_WORKDIR = flags.DEFINE_string("workdir", None, "export: a training run, or an inference folder.")
_STEP = flags.DEFINE_integer("step", None, "export: which checkpoint; the newest when absent.")
_TO = flags.DEFINE_enum("to", None, formats.WRITTEN, "export: the format.")
_METRICS = flags.DEFINE_string(
    "metrics", None, "export: metrics.json of an evaluation; <workdir>/evaluation/ when there."
)
_FROM = flags.DEFINE_enum("from", None, formats.READ, "import: the family.")
_MODEL = flags.DEFINE_string("model", None, "import: which of the family's published models.")
_CONFIG = config_flag.define(help_string="import: or a config of the model.")
_NEW_ATTENTION = flags.DEFINE_bool(
    "new_attention_order", None, "import of adm: what the model was trained with; --model knows it."
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "import of original files of models that read captions: file or folder."
)
_OUT = flags.DEFINE_string("out", None, "Folder that is written; it must not exist.", required=True)
flags.adopt_module_key_flags(sampling_flags)  # so that --help has them


def main(argv: list[str]) -> None:
    """Reads the flags, and imports or exports."""
    command, *paths = argv[1:] or [""]
    if command == "export" and not paths:
        for flag in (_WORKDIR, _TO):
            if not flag.value:
                raise UserError(f"export needs --{flag.name}")
        what, to = _WORKDIR.value, _TO.value
        model = pretrained.open_folder(what, _STEP.value)
    elif command == "import" and len(paths) == 1:
        if not _FROM.value:
            raise UserError("import needs --from")
        what, to = paths[0], "inference"
        model = formats.read(
            what,
            _FROM.value,
            name=_MODEL.value,
            config=_CONFIG.value,
            new_attention_order=_NEW_ATTENTION.value,
            tokenizer=_TOKENIZER.value,
        )
    else:
        raise UserError("say export --workdir=... --to=..., or import PATH --from=...")
    model = model.resampled(**sampling_flags.values())
    formats.write(model, to, _OUT.value, metrics=_metrics())
    logging.info("step %d of %s as %s in %s", model.step, what, to, _OUT.value)


def _metrics() -> str | None:
    """The evaluation that the card quotes."""
    if _METRICS.value or not _WORKDIR.value:
        return _METRICS.value
    found = pathlib.Path(_WORKDIR.value) / "evaluation" / "metrics.json"
    return str(found) if found.exists() else None


if __name__ == "__main__":
    app.run(main, positional=2)
