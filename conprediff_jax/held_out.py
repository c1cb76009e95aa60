"""The denoising loss of trained models on held-out images, time by time; bits a token if discrete.

    python -m conprediff_jax.held_out --workdir=runs/openmoji,runs/no_context --split=test --num=256

Every model sees the same images with the same noise, so that models of one process can be compared
number by number. The loss is that of the config, for discrete models the variational bound in nats
a token, without the auxiliary loss. Its mean over the times and, for discrete models, the bound in
bits a token are printed with their standard errors over the images; all is written to
`<first workdir>/denoising_loss.json`, or to --out.
"""

import json

import numpy as np
from absl import flags, logging
from etils import epath

from conprediff_jax import data, parallel
from conprediff_jax.cli import app
from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import check_file, write_text
from conprediff_jax.common.progress import ProgressLine
from conprediff_jax.diffusion.categorical import CategoricalProcess
from conprediff_jax.metrics import denoising_loss
from conprediff_jax.runs.restore import load, load_experiment, load_model

_WORKDIRS = flags.DEFINE_list("workdir", None, "Workdirs of training runs.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; the newest when absent.")
_SPLIT = flags.DEFINE_string("split", "test", "Split of the data of each model's config.")
_NUM = flags.DEFINE_integer("num", 256, "Images, or as many as there are.", lower_bound=1)
_TIMES = flags.DEFINE_integer("times", 20, "Times of a continuous process.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 32, "Images at a time.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "JSON file.")


def main(argv: list[str]) -> None:
    """Evaluates every workdir in turn, prints a table and writes the JSON file."""
    del argv
    out = epath.Path(_OUT.value or epath.Path(_WORKDIRS.value[0]) / "held_out.json")
    check_file(out, "--out")
    for workdir in _WORKDIRS.value:
        load_model(workdir, _STEP.value)  # before hours are spent
    found = {workdir: _evaluate(workdir) for workdir in _WORKDIRS.value}
    write_text(out, json.dumps(found, indent=2) + "\n")
    for workdir, result in found.items():
        summary = "   ".join(
            f"{name} {mean:.5g} +- {error:.2g}" for name, (mean, error) in result["means"].items()
        )
        print(f"{workdir}, step {result['step']}, {result['images']} images:   {summary}")
    logging.info("losses of every time: %s", out)


def _evaluate(workdir: str) -> dict:
    mesh = parallel.make_mesh(parallel.MeshSpec())
    model, params, frozen, step = load(workdir, mesh, _STEP.value)
    spec = load_experiment(workdir, step).data.of_images(split=_SPLIT.value)
    num = min(_NUM.value, data.num_examples(spec))
    times = denoising_loss.evaluated_times(model, _TIMES.value)
    batches = data.evaluation_iterator(spec, batch_size=_BATCH.value, tokenizer=model.tokenizer)
    progress, parts = ProgressLine(num, "images", about=workdir), []
    losses = denoising_loss.make_losses(model, mesh, times)
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
