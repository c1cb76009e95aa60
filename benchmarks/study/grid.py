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
from conprediff_jax.common import metric_rows
from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import write_text
from conprediff_jax.common.trees import flatten
from conprediff_jax.config import term
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.tasks.denoising import CONTEXT
from conprediff_jax.train import needs
from conprediff_jax.train.loop import train

BASELINE = "baseline"
MEASURED = "measured"
_SPEED = re.compile(r"([\d.]+) steps/s")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to train. Settings vary only one term of the loss, so that pairs differ in it alone.

    Attributes:
        term: Kind of the term; the config's own context prediction, or a rival in its place.
        values: Keys of the term's section and their values.
        weight: Factor on the weight of the term, which is the config's context weight, or the
            rival's own `weight` in `values`; 0 for the plain diffusion model.
        warmup: Share of the training steps over which the weight rises; None for the config's
            value.
        longer: Factor on the number of training steps, with which the baseline can train for as
            long as a slower setting does.
    """

    term: str = CONTEXT
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weight: float = 1.0
    warmup: float | None = None
    longer: float = 1.0

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"weight is {self.weight}: it must not be negative")

    def __add__(self, other: "Setting") -> "Setting":
        """This setting with what another one changes; factors multiply.

        Raises:
            ValueError: Both have a rival of context prediction, or set the same key differently.
        """
        if CONTEXT not in (self.term, other.term):
            raise ValueError(f"{self.term} and {other.term} are two terms: give one")
        for key in self.values.keys() & other.values.keys():
            if self.values[key] != other.values[key]:
                raise ValueError(f"{key} is {self.values[key]} and {other.values[key]}: give one")
        return Setting(
            term=other.term if self.term == CONTEXT else self.term,
            values={**self.values, **other.values},
            weight=self.weight * other.weight,
            warmup=self.warmup if other.warmup is None else other.warmup,
            longer=self.longer * other.longer,
        )

    def apply(self, config: ConfigDict) -> None:
        """Changes a config to train in this way."""
        with config.unlocked():
            config.train.steps = round(self.longer * config.train.steps)
            values = dict(self.values)
            warmup = config.context.warmup_steps
            if self.warmup is not None:
                warmup = round(self.warmup * config.train.steps)
            if self.term == CONTEXT:
                values |= {"weight": self.weight * config.context.weight, "warmup_steps": warmup}
                if "tap" in values:  # context prediction reads one tap or several
                    values["tap"] = (values["tap"],)
                config.context.update_from_flattened_dict(values)
                return
            config.context.weight = 0.0
            values |= {"weight": self.weight * values["weight"], "warmup_steps": warmup}
            config.terms = ConfigDict({"rival": term(self.term, **values)})


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
        longer: See `Setting`.
    """

    setting: str
    seed: int
    folder: pathlib.Path
    file: pathlib.Path
    config: ConfigDict
    measured: Mapping[str, Any]
    longer: float = 1.0

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

    def milestones(self, count: int) -> list[int]:
        """The steps of at most `count` checkpoints before the last, evenly spaced."""
        every = milestone(self.config, count)
        return list(range(every, self.config.train.steps, every)) if every else []

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

    def cosines(self) -> list[tuple[int, float]]:
        """The steps of the log, and the average cosine of gradients at each of them.

        The cosine is that between the gradients of the term and of the denoising loss. Only runs
        whose term has `cosine_every` measure it; other runs have none.
        """
        return [
            (row["step"], value)
            for row in metric_rows.read(self.folder)
            for name, value in row.items()
            if name.startswith("cosine/")
        ]


def milestone(config: ConfigDict, count: int) -> int:
    """The steps between the checkpoints of a curve, see `measure.Sizes.curve`; 0 for none."""
    return -(-config.train.steps // (count + 1)) if count else 0


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
            candidate = config.copy_and_resolve_references()
            setting.apply(candidate)
            kept = milestone(candidate, measured.get("curve", 0))
            # One checkpoint is enough to continue from, and a study has many runs.
            own = {"train.keep": 1, "train.keep_every": kept, "seed": seed}
            candidate.update_from_flattened_dict(own)
            make_experiment(candidate)
            folder = out / name / f"seed_{seed}"
            run = Run(
                setting=name, seed=seed, folder=folder, file=file, config=candidate,
                measured=measured, longer=setting.longer,
            )  # fmt: skip
            runs.append(run)
    for run in runs:
        run.claim()
    return runs
