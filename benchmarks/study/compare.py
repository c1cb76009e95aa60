"""From measured runs to paired differences: setting minus baseline of the same seed."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from conprediff_jax.metrics.bootstrap import Figure, mean_figure
from study.grid import BASELINE, MEASURED
from study.measure import HELD_OUT, LOSS
from study.paired import independent_difference, paired_difference

SPEED = "steps/s, ratio"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A measured run.

    Attributes:
        setting: name of its setting.
        seed: of the run.
        folder: where it lives.
        found: what `measure` wrote.
    """

    setting: str
    seed: int
    folder: pathlib.Path
    found: Mapping[str, Any]

    @property
    def metrics(self) -> dict[str, Figure]:
        """Figures by name; intervals are over the run's own samples or images."""
        return {name: Figure(**figure) for name, figure in self.found["metrics"].items()}

    def held_out(self) -> np.ndarray | None:
        """Held-out loss of every image, a mean over the times; None where only results are kept."""
        file = self.folder / MEASURED / HELD_OUT
        return np.load(file).mean(axis=1) if file.exists() else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A metric of a setting, compared with the baseline's.

    Attributes:
        difference: mean over the pairs; its interval is that of a paired t over seeds, or, of a
            single pair, over its samples alone.
        differences: of every pair; for `SPEED`, ratios.
        within: mean half-width of a pair's own interval, over samples, divided by the root of the
            pairs; None where a metric has no such interval.
        baseline: mean of the baseline's values.
        none: what `difference` would be without any.
    """

    difference: Figure
    differences: tuple[float, ...]
    within: float | None
    baseline: float
    none: float = 0.0

    @property
    def clear(self) -> bool:
        """Whether the interval excludes no difference."""
        low, high = self.difference[1:]
        return low is not None and not low <= self.none <= high


def load(out: pathlib.Path) -> list[Result]:
    """All measured runs of a study, in the order of settings' names and seeds."""
    results = []
    for file in out.glob("*/seed_*/result.json"):
        found = json.loads(file.read_text())
        results.append(
            Result(setting=found["setting"], seed=found["seed"], folder=file.parent, found=found)
        )
    return sorted(results, key=lambda result: (result.setting, result.seed))


def pairs(results: Sequence[Result], setting: str) -> list[tuple[Result, Result]]:
    """Runs of a setting, each with the baseline's run of its seed, for seeds that have both.

    Raises:
        ValueError: the two models of a pair differ in size when they are sampled.
    """
    baseline = {result.seed: result for result in results if result.setting == BASELINE}
    found = [
        (result, baseline[result.seed])
        for result in results
        if result.setting == setting and result.seed in baseline
    ]
    for one, other in found:
        if one.found["parameters"] != other.found["parameters"]:
            raise ValueError(
                f"{one.folder} and {other.folder}: {one.found['parameters']} and "
                f"{other.found['parameters']} parameters at inference; pairs must be of one size"
            )
    return found


def compare(results: Sequence[Result], setting: str) -> dict[str, Comparison]:
    """Every metric of a setting against the baseline; empty where there are no pairs."""
    matched = pairs(results, setting)
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


def _compared(name: str, matched: Sequence[tuple[Result, Result]]) -> Comparison:
    figures = [(one.metrics[name], other.metrics[name]) for one, other in matched]
    values = np.array([[figure.value for figure in pair] for pair in figures])
    difference, differences = paired_difference(*values.T.tolist())
    own = [independent_difference(*pair) for pair in figures]
    if name == LOSS:  # the same images with the same noise: compared one by one
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
    """Of two runs, with an interval over images, if the losses of every image are there."""
    mine, theirs = one.held_out(), other.held_out()
    if mine is None or theirs is None:
        return Figure(one.metrics[LOSS].value - other.metrics[LOSS].value)
    return mean_figure(mine - theirs, replicates=1000, rng=np.random.default_rng(0))


def loss_by_time(
    results: Sequence[Result], setting: str
) -> tuple[np.ndarray, np.ndarray, list[Figure]] | None:
    """Times as shares of the process, and the difference of the held-out loss at each, in %.

    Returns:
        Times, the baseline's mean losses, and differences; None without pairs.
    """
    matched = pairs(results, setting)
    if not matched:
        return None
    mine, theirs = (
        np.array([r.found["losses"] for r in side]) for side in zip(*matched, strict=True)
    )
    percent = 100 * (mine / theirs - 1)
    zero = [0.0] * len(percent)
    times = np.asarray(matched[0][0].found["times"]) / matched[0][0].found["num_steps"]
    figures = [paired_difference(column.tolist(), zero).figure for column in percent.T]
    return times, theirs.mean(axis=0), figures
