"""Does context prediction help, and what does it cost? Matched pairs of training runs.

    python benchmarks/ablation.py --config=configs/openmoji.py --settings=baseline,default
        --seeds=0,1,2 --out=runs/ablation --workers=2
    python benchmarks/ablation.py --config=configs/openmoji.py --out=runs/ablation --report

The study trains every setting with every seed as `conprediff_jax.main` does. Runs of one seed share
their initial parameters, the order of the data and the noise, and sample with the same network:
settings vary only context prediction, or have another term of the loss in its place. The study then
measures each run (`study/measure.py`) and prints paired differences as Markdown: a setting minus
the baseline of the same seed.

A setting can be put together with `+`, from the names that --help lists and the names of the
model's taps: `own_point+block_2+stop_half` is own-point prediction from block 2, which stops at
half of the run.

You can set any key of the config for all runs, as `--config.train.batch_size=16`. `--data` names
other data: a TFDS name, a prepared TFDS directory, or a folder of images with subfolders `train`
and `test`.

With `--workers=N`, N processes take the runs in turn, each on a core of its own: this is faster for
models that are too small to fill several cores. A process measures each run that it has trained.

All files are written to --out. If you start the study again, it continues: finished runs are kept,
and an interrupted run continues from its checkpoint. You can add settings and seeds. On SIGTERM,
the runs in progress save their steps, and the study ends with exit code 75. `--report` only
rebuilds the tables and plots: report.md, report.json, report.png and held_out.png. Plots need
matplotlib.

`--figure=pixels=runs/ablation,tokens=runs/ablation_discrete:exact` draws <out>/figure.png: how much
a setting changes each metric in several studies, in percent. The setting is named after a colon;
without a colon, it is `default`.
"""

import pathlib
import sys
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict
from study import figure, grid, report, settings, workers
from study.grid import BASELINE

from conprediff_jax.cli import app, config_flag
from conprediff_jax.common import extras
from conprediff_jax.common.errors import UserError
from conprediff_jax.config.experiment import make_experiment

_CONFIG = config_flag.define("configs/openmoji.py")
_SETTINGS = flags.DEFINE_list(
    "settings",
    [BASELINE, "default"],
    settings.HELP,
)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds; every setting has a run for each.")
_STEPS = flags.DEFINE_integer("steps", None, "Training steps; by default those of the config.")
_DATA = flags.DEFINE_string("data", None, "Name of the data; by default that of the config.")
_NUM = flags.DEFINE_integer("num", 2048, "Samples drawn from each run.", lower_bound=12)
_HELD_OUT = flags.DEFINE_integer("held_out", 512, "Held-out images at most.", lower_bound=1)
_REFERENCE = flags.DEFINE_integer(
    "reference", None, "Compare samples with the first training images, this many; by default all.",
    lower_bound=12,
)  # fmt: skip
_SPLIT = flags.DEFINE_string("split", "test", "Split of the held-out images.")
_TIMES = flags.DEFINE_integer("times", 20, "Times of continuous held-out losses.", lower_bound=3)
_CURVE = flags.DEFINE_integer(
    "curve",
    0,
    "Also measure the losses of this many checkpoints before the last, evenly spaced.",
    lower_bound=0,
)
_BOOTSTRAP = flags.DEFINE_integer(
    "bootstrap", 100, "Replicates of the bootstrap; 0 for no intervals.", lower_bound=0
)
_BATCH = flags.DEFINE_integer("batch_size", 64, "Images measured at a time.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "runs/ablation", "Folder of the study.")
_REPORT = flags.DEFINE_bool("report", False, "Only rebuild tables and plots.")
_FIGURE = flags.DEFINE_list(
    "figure", [], "Only draw these studies: name=folder,name=folder:setting."
)
_MEASURE = flags.DEFINE_bool("measure", False, "Only measure the runs that have been trained.")
_WORKERS = flags.DEFINE_integer(
    "workers", 1, "Processes that train and measure; several have a core each.", lower_bound=1
)
_SERVE = flags.DEFINE_bool("serve", False, "Be one of these processes; the study starts them.")


def main(argv: list[str]) -> None:
    """Trains, measures and reports, or does one of these."""
    del argv
    extras.need("matplotlib", "plan")
    out = pathlib.Path(_OUT.value)
    if _FIGURE.value:
        _figure(out / "figure.png")
        return
    if _REPORT.value:
        _report(out)
        return
    config = _config()
    taps = make_experiment(config).task.model.denoiser.tap_names
    runs = grid.make_runs(
        out,
        config,
        app.config_name().resolve(),
        {name: settings.named(name, taps) for name in _chosen()},
        _integers(_SEEDS.value),
        measured=_measured(),
    )
    if _SERVE.value:
        workers.serve(runs, _Measure(config, out))
        return
    todo = [run for run in runs if run.trained] if _MEASURE.value else runs
    # Other processes train and measure; this process uses no accelerator.
    failed = workers.complete(todo, [sys.executable, *sys.argv, "--serve"], _WORKERS.value)
    if any(run.result.exists() for run in runs):
        _report(out)
    if failed:
        raise UserError(f"{len(failed)} failed; start again to go on: {'; '.join(failed)}")


def _config() -> ConfigDict:
    """The config of all runs, before a setting varies it."""
    config = _CONFIG.value.copy_and_resolve_references()
    given = config_flag.given()
    if _STEPS.value is not None:
        given["train.steps"] = _STEPS.value
    if _DATA.value is not None:
        given["data.name"] = _DATA.value
    varied = [key for key in given if key in ("seed", "train.keep", "train.keep_every")]
    if varied:
        raise UserError(f"--config.{varied[0]}: the study sets it; give --seeds or --curve")
    config.update_from_flattened_dict(given)
    if not config.get("context", {}).get("weight"):
        raise UserError("--config: the config has no context prediction (config.context.weight)")
    return config


def _chosen() -> list[str]:
    if not _SETTINGS.value:
        raise UserError(f"--settings is empty: choose of {', '.join(settings.SETTINGS)}")
    return _SETTINGS.value


def _integers(values: list[str]) -> list[int]:
    if not values or not all(value.isdigit() for value in values):
        raise UserError(f"--seeds={','.join(values)}: give whole numbers of at least 0")
    return [int(value) for value in values]


def _measured() -> dict[str, Any]:
    """The fields of `measure.Sizes`."""
    given = {"reference": _REFERENCE.value, "curve": _CURVE.value}
    return {name: value for name, value in given.items() if value} | {
        "num": _NUM.value,
        "held_out": _HELD_OUT.value,
        "times": _TIMES.value,
        "replicates": _BOOTSTRAP.value,
        "batch_size": _BATCH.value,
        "split": _SPLIT.value,
    }


class _Measure:
    """Measures runs, and writes their results. The references are read for the first of them."""

    def __init__(self, config: ConfigDict, out: pathlib.Path):
        self._config, self._out, self._judge = config, out, None

    def __call__(self, run: grid.Run) -> None:
        from study import measure

        if self._judge is None:
            experiment = make_experiment(self._config)
            cell = experiment.data.image_shape[0] // experiment.task.model.point_shape[0]
            sizes = measure.Sizes(**_measured())
            self._judge = measure.Judge(experiment.data, sizes, cell, self._out / "features")
        if not (self._out / measure.REAL).exists():
            real = {name: figure._asdict() for name, figure in self._judge.real().items()}
            measure.write(self._out / measure.REAL, real)
        measure.write(run.result, self._judge(run))
        logging.info("measured %s: %s", run.title, run.result)


def _report(out: pathlib.Path) -> None:
    try:
        text = report.write(out)
    except FileNotFoundError as error:
        raise UserError(f"--out={error}") from error
    print(text, flush=True)
    pictures = [name for name in report.PICTURES if (out / name).exists()]
    logging.info("%s", ", ".join([str(out / "report.md"), "report.json", *pictures]))


def _figure(path: pathlib.Path) -> None:
    if not all("=" in study for study in _FIGURE.value):
        raise UserError(f"--figure={','.join(_FIGURE.value)}: give name=folder for each study")
    studies = {}
    for study in _FIGURE.value:
        name, place = study.split("=", 1)
        folder, _, setting = place.partition(":")
        studies[name] = (pathlib.Path(folder), setting or "default")
    try:
        figure.draw(studies, path)
    except FileNotFoundError as error:
        raise UserError(f"--figure: {error}") from error
    logging.info("%s", path)


if __name__ == "__main__":
    app.run(main, again="the same command continues the study")
