"""Computes the denoising loss of trained models on held-out images, for every time of the process.

    python -m conprediff_jax.held_out --workdir=runs/openmoji,runs/no_context --split=test --num=256
    python -m conprediff_jax.held_out --workdir=runs/openmoji
    python -m conprediff_jax.held_out --workdir=runs/openmoji --split=train --times=50

All models see the same images with the same noise, so the numbers of models with the same process
can be compared one by one. The loss is that of the config; for discrete models it is the
variational bound in nats per token, without the auxiliary loss. The command prints the mean over
the times and, for discrete models, the bound in bits per token, with their standard errors over the
images. It adds these and the loss at every time, with all that they depend on, to the tables
`<first workdir>/held_out.json` and `held_out.md`, or to --out. There, `low` and `high` are the ends
of 95 % intervals. It can run as one of several processes, which share the images among them.
"""

from collections.abc import Iterator
from typing import Any

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
    "Evaluate this many times, evenly spaced; of the process mask_and_replace all times are "
    "evaluated.",
    lower_bound=1,
)
_BATCH = flags.DEFINE_integer(
    "batch_size", 32, "Evaluate this many images at a time.", lower_bound=1
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "Add results to this JSON file, and to a table beside it; the default is <first workdir>/"
    "held_out.json.",
)

help.answer(__name__, several=True)  # before imports that take seconds

import jax
import numpy as np
from absl import logging
from etils import epath

from conprediff_jax import data
from conprediff_jax.cli import app
from conprediff_jax.common import hub, opening
from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import check_file
from conprediff_jax.common.fingerprint import fingerprint
from conprediff_jax.common.progress import ProgressLine
from conprediff_jax.common.version import code_version
from conprediff_jax.diffusion.tokens import TokenProcess
from conprediff_jax.metrics import denoising_loss
from conprediff_jax.metrics.bootstrap import Figure
from conprediff_jax.metrics.results import ResultsTable
from conprediff_jax.parallel import share
from conprediff_jax.runs.restore import load, load_experiment, load_model
from conprediff_jax.sampling import record

_WIDTH = 1.96  # standard errors from the mean to the ends of an interval


def main(argv: list[str]) -> None:
    """Evaluates every workdir in turn, prints a table, and writes the JSON file."""
    del argv
    first = epath.Path(hub.results_folder(_WORKDIRS.value[0]))
    out = epath.Path(_OUT.value or first / "held_out.json")
    check_file(out, "--out")
    if out.suffix != ".json":
        raise UserError(f"--out={out}: the results are a JSON file; name one that ends in .json")
    for workdir in _WORKDIRS.value:  # fails now, and not after hours of work
        load_model(workdir, _STEP.value)
    for workdir in _WORKDIRS.value:
        data.num_examples(_images_of(workdir, _STEP.value))
    opening.say(
        f"{', '.join(_WORKDIRS.value)}, and {_NUM.value} images of split {_SPLIT.value!r}",
        "the denoising loss at every time",
        out,
    )
    table, found = ResultsTable(out) if share.is_first() else None, {}
    for workdir in _WORKDIRS.value:
        settings, means, losses = _evaluate(workdir)
        figures = {
            name: Figure(x, x - _WIDTH * e, x + _WIDTH * e) for name, (x, e) in means.items()
        }
        if table:
            table.add(settings, figures, **losses)
        found[workdir] = settings, means
    if not table:
        return
    for workdir, (settings, means) in found.items():
        summary = "   ".join(f"{name} {x:.5g} +- {e:.2g}" for name, (x, e) in means.items())
        count = settings["images"]["count"]
        print(f"{workdir}, step {settings['step']}, {count} images:   {summary}")
    _say_what_differs({workdir: settings for workdir, (settings, *_) in found.items()})
    logging.info("losses at every time are in %s", out)


def _say_what_differs(found: dict[str, record.Settings]) -> None:
    """Says which models were trained on other data, or see other images, than the first model."""
    (first, wanted), *others = found.items()
    for workdir, settings in others:
        trained = [" ".join(s["trained_on"].values()) for s in (settings, wanted)]
        same = settings["images"]["fingerprint"] == wanted["images"]["fingerprint"]
        if trained[0] != trained[1] or not same:
            logging.warning(
                "%s was trained on %s, and %s on %s; %s",
                workdir, trained[0], first, trained[1],
                "both see the same held-out images" if same
                else "they see different held-out images, so their losses cannot be compared",
            )  # fmt: skip


def _images_of(workdir: str, step: int | None) -> data.DataSpec:
    """The held-out images of the data that a model was trained on."""
    return load_experiment(workdir, step).data.of_images(split=_SPLIT.value)


def _evaluate(workdir: str) -> tuple[record.Settings, dict[str, tuple], dict[str, list]]:
    """All that the losses of a model depend on; their means with errors; the loss at every time."""
    mesh = share.local_mesh()
    trained = load(workdir, mesh, _STEP.value)
    model, trained_on = trained.model, load_experiment(workdir, trained.step).data
    spec = _images_of(workdir, trained.step)
    num = min(_NUM.value, data.num_examples(spec))
    times = model.process.evaluated_times(_TIMES.value)
    batches = data.evaluation_iterator(
        spec,
        batch_size=_BATCH.value,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        tokenizer=model.tokenizer,
    )
    progress, parts, seen = ProgressLine(num, "images", about=workdir), [], []
    losses = denoising_loss.make_losses(model, mesh, times)
    batches = _noted(batches, seen)
    progress.compiling()
    for part in denoising_loss.losses_of(losses, trained.params, trained.frozen, batches, num):
        parts.append(part)
        progress.add(len(part))
    rows = np.concatenate(parts)
    seen = [image for batch in share.in_turn(seen) for image in batch]
    if not len(rows):
        raise UserError(f"{spec.name}: no image of split {spec.split!r} can be decoded")
    means = {"loss": rows.mean(axis=1)}
    if isinstance(model.process, TokenProcess):
        means["bits per token"] = denoising_loss.bits_per_token(model.process, rows)
    settings = record.model_of(trained, workdir) | {
        "trained_on": {"name": trained_on.name, "split": trained_on.split},
        "images": {
            "name": spec.name,
            "split": spec.split,
            "count": len(rows),
            "fingerprint": fingerprint(seen[: len(rows)]),
        },
        "times": len(times),
        "version": code_version(),
    }
    errors = {
        name: (float(values.mean()), float(values.std() / np.sqrt(len(values))))
        for name, values in means.items()
    }
    return settings, errors, {"times": times.tolist(), "losses": rows.mean(axis=0).tolist()}


def _noted(batches: Iterator[dict[str, Any]], seen: list[list[bytes]]) -> Iterator[dict[str, Any]]:
    """The batches; adds to `seen`, for each, the fingerprints of images that can be decoded."""
    for batch in batches:
        decoded = batch["image"][batch["mask"]]
        seen.append([fingerprint([image.tobytes()]).encode() for image in decoded])
        yield batch


if __name__ == "__main__":
    app.run(main, several=True)
