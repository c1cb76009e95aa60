"""Paired differences of measured runs: a setting minus the baseline, or minus another."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from conprediff_jax.common.errors import UserError
from conprediff_jax.metrics.bootstrap import Figure, mean_figure
from study.grid import BASELINE, MEASURED
from study.measure import HELD_OUT, LOSS
from study.paired import independent_difference, paired_difference

SPEED = "steps/s, ratio"
_NEEDED = (
    "setting",
    "seed",
    "step",
    "parameters",
    "steps_per_second",
    "metrics",
    "times",
    "losses",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A measured run.

    Attributes:
        setting: Name of its setting.
        seed: Seed of the run.
        folder: Folder of the run.
        found: The figures that `measure` wrote.
    """

    setting: str
    seed: int
    folder: pathlib.Path
    found: Mapping[str, Any]

    @functools.cached_property
    def metrics(self) -> dict[str, Figure]:
        """The figures by name, with intervals over the run's own samples or images."""
        return {name: Figure(**figure) for name, figure in self.found["metrics"].items()}

    @property
    def cosines(self) -> list[tuple[int, float]]:
        """See `Run.cosines`; empty for results that have none."""
        return self.found.get("cosines", [])

    @property
    def matched(self) -> dict[str, int]:
        """What is the same in both runs of a pair; steps are those of the study."""
        steps = round(self.found["step"] / self.found.get("longer", 1.0))
        return {"steps": steps, "parameters": self.found["parameters"]}

    def held_out(self) -> np.ndarray | None:
        """Held-out loss of every image, a mean over times; None if the file of them is missing."""
        file = self.folder / MEASURED / HELD_OUT
        return np.load(file).mean(axis=1) if file.exists() else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A metric of a setting, compared with that of the baseline.

    Attributes:
        difference: Mean difference over the pairs. Its interval is that of a paired t-test over
            seeds; for a single pair, it is over the samples of that pair.
        differences: Difference of every pair; for `SPEED`, the ratio.
        within: Mean half-width of the pairs' own intervals over samples, divided by the square root
            of the number of pairs; None if the metric has no such interval.
        baseline: Mean of the baseline's values.
        none: The value of `difference` that means no difference.
    """

    difference: Figure
    differences: tuple[float, ...]
    within: float | None
    baseline: float
    none: float = 0.0

    @property
    def clear(self) -> bool:
        """Whether the interval excludes the value `none`."""
        low, high = self.difference[1:]
        return low is not None and (low > self.none or high < self.none)


def load(out: pathlib.Path) -> list[Result]:
    """All measured runs of a study, sorted by setting and seed.

    Raises:
        UserError: A result is not complete, or belongs to another folder.
    """
    results = []
    for file in out.glob("*/seed_*/result.json"):
        try:
            found = json.loads(file.read_text())
        except ValueError:
            found = {}
        fault = _fault(found)
        if fault:
            raise UserError(
                f"{file}: is not complete, {fault}: delete it and start the study again, which "
                "measures the run once more"
            )
        place = f"{found['setting']}/seed_{found['seed']}"
        if file.parent != out / place:
            raise UserError(f"{file}: is the result of {place}, and must be in a folder {place}")
        results.append(
            Result(setting=found["setting"], seed=found["seed"], folder=file.parent, found=found)
        )
    return sorted(results, key=lambda result: (result.setting, result.seed))


def _fault(found: Mapping[str, Any]) -> str:
    """What a result lacks; empty if it is whole."""
    missing = [key for key in _NEEDED if key not in found]
    if missing:
        return f"{missing[0]!r} is missing"
    if len(found["losses"]) != len(found["times"]):
        return f"it has {len(found['losses'])} losses at {len(found['times'])} times"
    losses = [name for name in found["metrics"] if name.startswith(LOSS)]
    for point in found.get("curve", []):
        for name in losses:
            if name not in point["metrics"]:
                return f"{name!r} is missing in its curve at step {point['step']}"
    return ""


def pairs(
    results: Sequence[Result], setting: str, against: str = BASELINE
) -> list[tuple[Result, Result]]:
    """Pairs of a setting's run and the run of the same seed that it is compared with.

    Args:
        results: All measured runs.
        setting: Name of the setting.
        against: Name of the setting that it is compared with.

    Raises:
        UserError: The runs of a pair differ in their steps without having been asked to, or their
            models differ in the number of parameters for sampling.
    """
    others = {result.seed: result for result in results if result.setting == against}
    found = [
        (result, others[result.seed])
        for result in results
        if result.setting == setting and result.seed in others
    ]
    for one, other in found:
        for key in ("steps", "parameters"):
            mine, theirs = one.matched[key], other.matched[key]
            if mine != theirs:
                raise UserError(
                    f"{one.folder} and {other.folder}: {key} is {mine} and {theirs}; it must be "
                    "the same in both runs of a pair"
                )
    return found


def compare(
    results: Sequence[Result], setting: str, against: str = BASELINE
) -> dict[str, Comparison]:
    """Compares every metric of a setting with another one; empty if there are no pairs."""
    matched = pairs(results, setting, against)
    if not matched:
        return {}
    common = [
        name for name in matched[0][0].metrics if all(name in r.metrics for p in matched for r in p)
    ]
    found = {name: _compared(name, matched) for name in common}
    speeds = [[r.found["steps_per_second"] for r in pair] for pair in matched]
    if np.all(np.asarray(speeds) > 0):
        mine, theirs = np.log(speeds).T.tolist()
        ratio, logs = paired_difference(mine, theirs)
        found[SPEED] = Comparison(
            difference=Figure(*(x if x is None else float(np.exp(x)) for x in ratio)),
            differences=tuple(np.exp(logs).tolist()),
            within=None,
            baseline=1.0,
            none=1.0,
        )
    return found


def reached(results: Sequence[Result], setting: str, metric: str) -> list[float]:
    """When the runs of a setting reach the last value of their baseline, as shares of its steps.

    Between two checkpoints, the metric counts as linear in the step.

    Returns:
        A share for every pair: 0.8 says that 80 % of the steps were enough, and infinity that the
        run never gets there. Empty if no curve was measured.
    """
    found = []
    for one, other in pairs(results, setting):
        goal, last = other.metrics[metric].value, other.found["step"]
        curve = [(point["step"], point["metrics"][metric]) for point in one.found.get("curve", [])]
        if not curve:
            return []
        curve.append((one.found["step"], one.metrics[metric].value))
        found.append(_crossing(curve, goal) / last)
    return found


def _crossing(curve: Sequence[tuple[int, float]], goal: float) -> float:
    """The first step at which a falling curve reaches a value; infinity if it does not."""
    before = None
    for step, value in curve:
        if value <= goal:
            if before is None:
                return float(step)
            share = (before[1] - goal) / (before[1] - value)
            return before[0] + share * (step - before[0])
        before = step, value
    return float("inf")


def _compared(name: str, matched: Sequence[tuple[Result, Result]]) -> Comparison:
    figures = [(one.metrics[name], other.metrics[name]) for one, other in matched]
    values = np.array([[figure.value for figure in pair] for pair in figures])
    difference, differences = paired_difference(*values.T.tolist())
    own = [independent_difference(*pair) for pair in figures]
    if name == LOSS:  # the images and their noise are the same, so they are compared one by one
        own = [_loss_difference(one, other) for one, other in matched]
    within = None
    if all(figure.low is not None for figure in own):
        halves = [(figure.high - figure.low) / 2 for figure in own]
        within = float(np.mean(halves) / np.sqrt(len(halves)))
    if difference.low is None:
        difference = own[0]
    return Comparison(
        difference=difference,
        differences=differences,
        within=within,
        baseline=float(values[:, 1].mean()),
    )


def _loss_difference(one: Result, other: Result) -> Figure:
    """Difference of two runs' losses, with an interval over images if their losses are kept."""
    mine, theirs = one.held_out(), other.held_out()
    if mine is None or theirs is None:
        return Figure(one.metrics[LOSS].value - other.metrics[LOSS].value)
    return mean_figure(mine - theirs, replicates=1000, rng=np.random.default_rng(0))


def loss_by_time(
    results: Sequence[Result], setting: str
) -> tuple[np.ndarray, np.ndarray, list[Figure]] | None:
    """The held-out loss by time.

    Returns:
        Times t / T, the baseline's mean losses, and the differences of the setting from them in
        percent; None if there are no pairs.
    """
    matched = pairs(results, setting)
    if not matched:
        return None
    mine, theirs = (
        np.array([r.found["losses"] for r in side]) for side in zip(*matched, strict=True)
    )
    percent = 100 * (mine / theirs - 1)
    zero = [0.0] * len(percent)
    found = matched[0][0].found
    # Older results have the number of steps of the process in the place of shares.
    times = np.asarray(found.get("shares") or np.asarray(found["times"]) / found["num_steps"])
    figures = [paired_difference(column.tolist(), zero).figure for column in percent.T]
    return times, theirs.mean(axis=0), figures
