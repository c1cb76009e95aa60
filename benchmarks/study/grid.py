"""The runs of a study: their folders, and the processes that train and measure them.

    <out>/<setting>/seed_<n>/
        run.json         what is trained and measured; a folder with another content is refused
        train.log        the log of the trainer
        checkpoints/     and the other files of the trainer
        measured/        images drawn from the last checkpoint, their features, held-out losses
        result.json      all figures; a run that has this file is done

The runs of one seed come one after another, so that pairs are complete early.
"""

import dataclasses
import json
import pathlib
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import write_text
from conprediff_jax.common.progress import Progress
from conprediff_jax.common.trees import flatten
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.parallel.processes import RESTART_CODE, Preempted

BASELINE = "baseline"
MEASURED = "measured"
_SPEED = re.compile(r"([\d.]+) steps/s")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to train. Settings vary only context prediction, so that pairs differ in it alone.

    Attributes:
        context: Keys of the config's `context` section and their values.
        weight: Factor on the config's context weight; 0 for the plain diffusion model.
        warmup: Share of the training steps over which the weight rises; None for the config's
            value.
    """

    context: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weight: float = 1.0
    warmup: float | None = None

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"weight is {self.weight}: it must not be negative")

    def overrides(self, config: ConfigDict) -> dict[str, Any]:
        """The keys of the config that the setting changes, and their values."""
        found = {f"context.{key}": value for key, value in self.context.items()}
        if self.weight != 1:
            found["context.weight"] = self.weight * config.context.weight
        if self.warmup is not None:
            found["context.warmup_steps"] = round(self.warmup * config.train.steps)
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training run and its measurement.

    Attributes:
        setting: Name of its setting.
        seed: Seed of parameters, data order and noise.
        folder: Folder of the run, which is the trainer's workdir too.
        config: Path of the config file.
        overrides: Keys of the config that differ from the file, and their values.
        values: All keys of the config and their values as text.
        measured: What is measured: sizes of sets and the name of the split.
    """

    setting: str
    seed: int
    folder: pathlib.Path
    config: str
    overrides: Mapping[str, Any]
    values: Mapping[str, str]
    measured: Mapping[str, Any]

    @property
    def title(self) -> str:
        """Name of the run in messages."""
        return f"{self.setting}, seed {self.seed}"

    @property
    def result(self) -> pathlib.Path:
        """The file of all figures."""
        return self.folder / "result.json"

    @property
    def measured_folder(self) -> pathlib.Path:
        """The folder of samples, features and losses."""
        return self.folder / MEASURED

    @property
    def trained(self) -> bool:
        """Whether the last checkpoint exists."""
        return (self.folder / "checkpoints" / str(self.overrides["train.steps"])).is_dir()

    def claim(self) -> None:
        """Marks the folder as this run's, or checks that it is.

        Raises:
            UserError: The folder belongs to a run with another config or other measurements.
        """
        about = {"config": dict(self.values), "measured": dict(self.measured)}
        note = self.folder / "run.json"
        if not note.exists():
            write_text(note, json.dumps(about, indent=1) + "\n")
            return
        there = json.loads(note.read_text())
        for part, wanted in about.items():
            made = there[part]
            for key in sorted(made.keys() | wanted.keys()):
                if made.get(key) != wanted.get(key):
                    raise UserError(
                        f"{self.folder} was made with {part}.{key}={made.get(key)}, not "
                        f"{wanted.get(key)}: give the same value, or another --out"
                    )

    def train(self) -> None:
        """Trains by `conprediff_jax.main`, from the newest checkpoint if there is one.

        Raises:
            RunError: Training failed.
            Preempted: Training was asked to stop.
        """
        command = [sys.executable, "-m", "conprediff_jax.main", f"--config={self.config}"]
        command += [f"--config.{key}={value}" for key, value in self.overrides.items()]
        execute([*command, f"--workdir={self.folder}"], self.folder / "train.log")

    def speed(self) -> float:
        """Median of the steps/s in the log of the trainer; 0 if there is none."""
        said = _SPEED.findall((self.folder / "train.log").read_text())
        return statistics.median(float(value) for value in said) if said else 0.0


class RunError(Exception):
    """A run or its measurement failed."""


def make_runs(
    out: pathlib.Path,
    config: ConfigDict,
    file: str,
    settings: Mapping[str, Setting],
    seeds: Sequence[int],
    *,
    overrides: Mapping[str, Any],
    measured: Mapping[str, Any],
) -> list[Run]:
    """Makes all runs, sorted by seed, and checks their configs and folders before any training.

    Args:
        out: Folder of the study.
        config: The config that settings vary, with `overrides` applied.
        file: Path of the config file.
        settings: Settings by name.
        seeds: Seeds of the runs.
        overrides: Keys in which all runs differ from the file, and their values.
        measured: See `Run`.

    Raises:
        ConfigError: A setting does not fit the config; the message names the key.
        UserError: A folder belongs to another run.
    """
    runs = []
    for seed in seeds:
        for name, setting in settings.items():
            # One checkpoint is enough to continue from, and a study has many runs.
            own = {**overrides, "train.steps": config.train.steps, "train.keep": 1, "seed": seed}
            own |= setting.overrides(config)
            candidate = config.copy_and_resolve_references()
            candidate.update_from_flattened_dict(own)
            make_experiment(candidate)
            values = {key: str(value) for key, value in flatten(candidate.to_dict()).items()}
            folder = out / name / f"seed_{seed}"
            run = Run(
                setting=name, seed=seed, folder=folder, config=file, overrides=own,
                values=values, measured=measured,
            )  # fmt: skip
            runs.append(run)
    for run in runs:
        run.claim()
    return runs


def complete(runs: Sequence[Run], measure: Sequence[str]) -> list[str]:
    """Trains and measures the runs that are not done. If a run fails, the others continue.

    Args:
        runs: The runs in their order.
        measure: The command that measures all trained runs of a seed. `--seeds=<n>` is added to it.

    Returns:
        A message for each failure.

    Raises:
        Preempted: This process, or a run, was asked to stop.
    """
    signal.signal(signal.SIGTERM, _stop)
    # Training takes nearly all of the time, so progress counts the runs that are trained.
    trained = sum(run.trained for run in runs)
    progress, failed = Progress(len(runs), trained), []
    for seed in dict.fromkeys(run.seed for run in runs):
        group = [run for run in runs if run.seed == seed]
        for run in group:
            if run.trained:
                continue
            logging.info("training %s: run %d of %d", run.title, trained + 1, len(runs))
            try:
                run.train()
            except RunError as error:
                failed.append(f"{run.title}: {error}")
                logging.error("%s", failed[-1])
                continue
            trained += 1
            left = progress.left(progress.mark(trained))
            logging.info("trained %s: %d/%d runs  %s left", run.title, trained, len(runs), left)
        missing = [run for run in group if run.trained and not run.result.exists()]
        if missing:
            logging.info("measuring %d runs of seed %d", len(missing), seed)
            with progress.paused():
                failed += _measured([*measure, f"--seeds={seed}"], missing)
    return failed


def _measured(command: list[str], runs: Sequence[Run]) -> list[str]:
    """Measures runs, and returns a message for each failure."""
    try:
        execute(command, runs[0].folder.parent.parent / "measure.log")
    except RunError as error:
        logging.error("%s", error)
        return [f"measuring {run.title}: {error}" for run in runs if not run.result.exists()]
    return []


def execute(command: Sequence[str], log: pathlib.Path) -> None:
    """Runs a command, and copies its output to the standard error and to a file.

    Args:
        command: The command.
        log: The file, to which the output is appended.

    Raises:
        RunError: The command failed; the message has the last line of its output.
        Preempted: The command was asked to stop.
    """
    line = ""
    with log.open("a") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                sys.stderr.write(line)
            code = process.wait()
        except BaseException:  # on a stop, the trainer saves its step before it ends
            process.terminate()
            process.wait()
            raise
    if code == RESTART_CODE:
        raise Preempted("a run was asked to stop and has saved its step: start again to continue")
    if code:
        raise RunError(f"exit code {code}: {line.strip()} (see {log})")


def _stop(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # further signals change nothing
    raise Preempted("asked to stop: start again to continue")
