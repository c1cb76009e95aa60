"""The runs of a study: their configs and their folders.

    <out>/<setting>/seed_<n>/
        run.json         what is trained and measured; a folder with another content is refused
        train.log        the log of the trainer and of the measurement
        checkpoints/     and the other files of the trainer
        measured/        images drawn from the last checkpoint, their features, held-out losses
        result.json      all figures; a run that has this file is done

The runs of one seed come one after another, so that pairs are complete early.
"""

import dataclasses
import json
import pathlib
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from conprediff_jax.cli import headers
from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import write_text
from conprediff_jax.common.trees import flatten
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.train import needs
from conprediff_jax.train.loop import train

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
        file: Path of the config file.
        config: The whole config of the run.
        measured: What is measured: sizes of sets and the name of the split.
    """

    setting: str
    seed: int
    folder: pathlib.Path
    file: pathlib.Path
    config: ConfigDict
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
    def log(self) -> pathlib.Path:
        """The file of what training and measurement say."""
        return self.folder / "train.log"

    @property
    def trained(self) -> bool:
        """Whether the last checkpoint exists."""
        return (self.folder / "checkpoints" / str(self.config.train.steps)).is_dir()

    def claim(self) -> None:
        """Marks the folder as this run's, or checks that it is.

        Raises:
            UserError: The folder belongs to a run with another config or other measurements.
        """
        values = {key: str(value) for key, value in flatten(self.config.to_dict()).items()}
        about = {"config": values, "measured": dict(self.measured)}
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
        """Trains in this process, from the newest checkpoint if there is one.

        Raises:
            UserError: Something is missing, or the loss diverged.
            Preempted: Training was asked to stop.
        """
        needs.check(self.config, str(self.folder), headers.read(self.file).needs)
        train(self.config, str(self.folder))

    def speed(self) -> float:
        """Median of the steps/s in the log of the trainer; 0 if there is none."""
        said = _SPEED.findall(self.log.read_text())
        return statistics.median(float(value) for value in said) if said else 0.0


def make_runs(
    out: pathlib.Path,
    config: ConfigDict,
    file: pathlib.Path,
    settings: Mapping[str, Setting],
    seeds: Sequence[int],
    *,
    measured: Mapping[str, Any],
) -> list[Run]:
    """Makes all runs, sorted by seed, and checks their configs and folders before any training.

    Args:
        out: Folder of the study.
        config: The config that settings vary.
        file: Path of the config file.
        settings: Settings by name.
        seeds: Seeds of the runs.
        measured: See `Run`.

    Raises:
        ConfigError: A setting does not fit the config; the message names the key.
        UserError: A folder belongs to another run.
    """
    runs = []
    for seed in seeds:
        for name, setting in settings.items():
            # One checkpoint is enough to continue from, and a study has many runs.
            own = {"train.keep": 1, "seed": seed, **setting.overrides(config)}
            candidate = config.copy_and_resolve_references()
            candidate.update_from_flattened_dict(own)
            make_experiment(candidate)
            folder = out / name / f"seed_{seed}"
            run = Run(
                setting=name, seed=seed, folder=folder, file=file, config=candidate,
                measured=measured,
            )  # fmt: skip
            runs.append(run)
    for run in runs:
        run.claim()
    return runs
