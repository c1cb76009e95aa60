"""Computes the denoising loss of trained models on held-out images, for every time of the process.

    python -m conprediff_jax.held_out --workdir=runs/openmoji,runs/no_context --split=test --num=256
    python -m conprediff_jax.held_out --workdir=runs/openmoji
    python -m conprediff_jax.held_out --workdir=runs/openmoji --split=train --times=50

All models see the same images with the same noise, so the numbers of models with the same process
can be compared one by one. The loss is that of the config; for discrete models it is the
variational bound in nats per token, without the auxiliary loss. The command prints the mean over
the times and, for discrete models, the bound in bits per token, with their standard errors over the
images. It writes these and the loss at every time to `<first workdir>/held_out.json`, or to --out.
"""

import json

from absl import flags

from conprediff_jax.cli import help

_WORKDIRS = flags.DEFINE_list(
    "workdir",
    None,
    "Evaluate the models in these workdirs of training runs, or `inference` folders.",
    required=True,
)
_STEP = flags.DEFINE_integer(
    "step", None, "Use the checkpoint of this training step; the default is the newest."
)
_SPLIT = flags.DEFINE_string(
    "split", "test", "Use this split of the data that each model's config names."
)
_NUM = flags.DEFINE_integer(
    "num", 256, "Use the first NUM images, or all if there are fewer.", lower_bound=1
)
_TIMES = flags.DEFINE_integer(
    "times",
    20,
    "Evaluate this many times of a continuous process, evenly spaced; of a discrete process all "
    "times are evaluated.",
    lower_bound=1,
)
_BATCH = flags.DEFINE_integer(
    "batch_size", 32, "Evaluate this many images at a time.", lower_bound=1
)
_OUT = flags.DEFINE_string(
    "out", None, "Write results to this JSON file; the default is <first workdir>/held_out.json."
)

help.answer(__name__)  # before imports that take seconds

import numpy as np
from absl import logging
from etils import epath

from conprediff_jax import data, parallel
from conprediff_jax.cli import app
from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import check_file, write_text
from conprediff_jax.common.progress import ProgressLine
from conprediff_jax.diffusion.categorical import CategoricalProcess
from conprediff_jax.metrics import denoising_loss
from conprediff_jax.runs.restore import load, load_experiment, load_model


def main(argv: list[str]) -> None:
    """Evaluates every workdir in turn, prints a table, and writes the JSON file."""
    del argv
    out = epath.Path(_OUT.value or epath.Path(_WORKDIRS.value[0]) / "held_out.json")
    check_file(out, "--out")
    for workdir in _WORKDIRS.value:
        load_model(workdir, _STEP.value)  # fails now, and not after hours of work
    found = {workdir: _evaluate(workdir) for workdir in _WORKDIRS.value}
    write_text(out, json.dumps(found, indent=2) + "\n")
    for workdir, result in found.items():
        summary = "   ".join(
            f"{name} {mean:.5g} +- {error:.2g}" for name, (mean, error) in result["means"].items()
        )
        print(f"{workdir}, step {result['step']}, {result['images']} images:   {summary}")
    logging.info("losses at every time written to %s", out)


def _evaluate(workdir: str) -> dict:
    """The losses of one model, as plain data for the JSON file."""
    mesh = parallel.make_mesh(parallel.MeshSpec())
    model, params, frozen, step = load(workdir, mesh, _STEP.value)
    spec = load_experiment(workdir, step).data.of_images(split=_SPLIT.value)
    num = min(_NUM.value, data.num_examples(spec))
    times = model.process.evaluated_times(_TIMES.value)
    batches = data.evaluation_iterator(spec, batch_size=_BATCH.value, tokenizer=model.tokenizer)
    progress, parts = ProgressLine(num, "images", about=workdir), []
    losses = denoising_loss.make_losses(model, mesh, times)
    progress.compiling()
    for part in denoising_loss.losses_of(losses, params, frozen, batches, num):
        parts.append(part)
        progress.add(len(part))
    rows = np.concatenate(parts)
    if not len(rows):
        raise UserError(f"{spec.name}: no image of split {spec.split!r} can be decoded")
    means = {"loss": rows.mean(axis=1)}
    if isinstance(model.process, CategoricalProcess):
        means["bits per token"] = denoising_loss.bits_per_token(model.process, rows)
    return {
        "step": step,
        "images": len(rows),
        "times": times.tolist(),
        "losses": rows.mean(axis=0).tolist(),
        "means": {
            name: (float(values.mean()), float(values.std() / np.sqrt(len(values))))
            for name, values in means.items()
        },
    }


if __name__ == "__main__":
    app.run(main)
