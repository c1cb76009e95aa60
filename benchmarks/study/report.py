"""Reports a study as Markdown tables, JSON and pictures, from the runs measured so far."""

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from conprediff_jax.common.files import write_text
from conprediff_jax.metrics.bootstrap import Figure
from conprediff_jax.planning.tables import markdown
from study.compare import (
    SPEED,
    Comparison,
    Result,
    compare,
    load,
    loss_by_time,
    pairs,
    reached,
)
from study.grid import BASELINE
from study.measure import LOSS, REAL
from study.paired import FEW

_HIGHER = ("precision", "recall", SPEED)  # metrics of which a higher value is better
_NAME = "report"
PICTURES = (f"{_NAME}.png", "held_out.png")
_COLUMNS = 4  # settings in one table
_NEGLIGIBLE = 0.05  # of the largest loss of all times
_WHOLE = (LOSS, "FD-random-VGG16", "2 x 2 patterns, total variation")
_OVERVIEW = (  # the columns where all settings are in one table
    *_WHOLE,
    "difference W2, radius 1",
    "difference W2, radius 3",
    "difference W2, radius 1, points",
    "difference W2, radius 3, points",
)
Table = Mapping[str, Mapping[str, Comparison]]


def write(out: pathlib.Path) -> str:
    """Writes `report.md`, `report.json`, `report.png` and `held_out.png`; returns the Markdown.

    The settings are in alphabetical order, after the baseline.

    Args:
        out: Folder of the study.

    Raises:
        FileNotFoundError: No run has been measured.
    """
    results = load(out)
    if not results:
        raise FileNotFoundError(f"{out}: no run has been measured there")
    names = sorted(
        {result.setting for result in results}, key=lambda name: (name != BASELINE, name)
    )
    table = {name: compare(results, name) for name in names if name != BASELINE}
    table = {name: found for name, found in table.items() if found}
    real = {}
    if (out / REAL).exists():
        real = {name: Figure(**f) for name, f in json.loads((out / REAL).read_text()).items()}
    parts = [
        _overview(table),
        _runs(results, names, real),
        _differences(table),
        _mutual(results, list(table)),
        _earlier(results, list(table)),
        _cosines(results, names),
    ]
    text = "\n\n".join([*filter(None, parts), _notes(results, table)])
    write_text(out / f"{_NAME}.md", text + "\n")
    write_text(out / f"{_NAME}.json", json.dumps(_plain(results, table), indent=1) + "\n")
    differences, times = (out / picture for picture in PICTURES)
    if table:
        _plot(table, differences)
        _plot_times(results, list(table), times)
    else:  # pictures of an earlier report would not belong to this one
        differences.unlink(missing_ok=True)
        times.unlink(missing_ok=True)
    return text


def title(metric: str) -> str:
    """Name of a metric with an arrow up if higher values are better, or else an arrow down."""
    return f"{metric} {'↑' if metric.startswith(_HIGHER) else '↓'}"


def _overview(table: Table) -> str:
    """A table of all settings with the main metrics; empty where other tables hold them all."""
    if len(table) <= _COLUMNS:
        return ""
    metrics = [metric for metric in _OVERVIEW if all(metric in found for found in table.values())]
    rows = [[name, *(_percent(found[m]) for m in metrics)] for name, found in table.items()]
    said = (
        "Difference from the baseline in percent: the mean over pairs with its 95 % interval, or "
        f"every pair where there are fewer than {FEW}:"
    )
    return f"{said}\n\n{markdown(rows, ['setting', *map(title, metrics)])}"


def _runs(results: Sequence[Result], names: Sequence[str], real: Mapping[str, Figure]) -> str:
    """Tables of the means over the seeds of every setting, with standard deviations."""
    tables = []
    for part in _parts(names):
        header = ["metric", *part] + (["training images"] if real else [])
        rows = []
        for metric in dict.fromkeys(metric for result in results for metric in result.metrics):
            row = [title(metric)]
            for name in part:
                of_name = [r.metrics for r in results if r.setting == name]
                values = [metrics[metric].value for metrics in of_name if metric in metrics]
                spread = f" ± {_number(np.std(values, ddof=1))}" if len(values) > 1 else ""
                row.append(f"{_number(np.mean(values))}{spread}" if values else "")
            if real:
                row.append(_number(real[metric].value) if metric in real else "")
            rows.append(row)
        of = {n: [r.found["steps_per_second"] for r in results if r.setting == n] for n in part}
        rest = [""] * bool(real)
        rows.append(["training steps/s", *(_number(np.mean(of[n])) for n in part), *rest])
        rows.append(["seeds", *(str(len(of[n])) for n in part), *rest])
        tables.append(markdown(rows, header))
    return "\n\n".join(["Mean over seeds ± standard deviation:", *tables])


def _differences(table: Table) -> str:
    """Tables of differences, setting minus baseline of the same seed, with a row per metric."""
    if not table:
        return "No setting has been measured for the same seed as the baseline."
    metrics = list(dict.fromkeys(metric for found in table.values() for metric in found))
    tables = ["Setting minus baseline of the same seed, with 95 % intervals; of speeds, the ratio:"]
    for part in _parts(list(table)):
        rows = [
            [title(m), *(_cell(table[n][m], m) if m in table[n] else "" for n in part)]
            for m in metrics
        ]
        tables.append(markdown(rows, ["metric", *part]))
    return "\n\n".join(tables)


def _mutual(results: Sequence[Result], names: Sequence[str]) -> str:
    """Tables of few settings against each other, where enough pairs give them intervals."""
    if not 1 < len(names) <= 2 * _COLUMNS:
        return ""
    found = {
        (one, other): compare(results, one, other)
        for one, other in itertools.permutations(names, 2)
    }
    tables = []
    for metric in _WHOLE:
        if any(metric not in c or len(c[metric].differences) < FEW for c in found.values()):
            continue
        rows = [
            [one, *("" if one == other else _percent(found[one, other][metric]) for other in names)]
            for one in names
        ]
        said = f"{title(metric)}, the setting of the row minus that of the column, in percent:"
        tables.append(f"{said}\n\n{markdown(rows, ['setting', *names])}")
    return "\n\n".join(tables)


def _earlier(results: Sequence[Result], names: Sequence[str]) -> str:
    """A table of the shares of the steps after which the baseline's last values are reached."""
    metrics = [metric for metric in results[0].metrics if metric.startswith(LOSS)]
    rows = []
    for name in names:
        shares = [reached(results, name, metric) for metric in metrics]
        if any(shares):
            rows.append([name, *(" ".join(f"{100 * x:.0f}" for x in found) for found in shares)])
    if not rows:
        return ""
    said = "Percent of the steps after which each run reaches the last value of its baseline:"
    return f"{said}\n\n{markdown(rows, ['setting', *metrics])}"


def _cosines(results: Sequence[Result], names: Sequence[str]) -> str:
    """A table of the cosines of gradients, means over the seeds; empty where none was measured."""
    found: dict[str, dict[int, list[float]]] = {}
    for result in results:
        for step, value in result.cosines:
            found.setdefault(result.setting, {}).setdefault(step, []).append(value)
    if not found:
        return ""
    said = "Cosine between the gradients of the term and of the denoising loss, by the step:"
    steps = sorted({step for values in found.values() for step in values})
    rows = [
        [name, *(f"{np.mean(found[name][s]):+.2f}" if s in found[name] else "" for s in steps)]
        for name in names
        if name in found
    ]
    return f"{said}\n\n{markdown(rows, ['setting', *map(str, steps)])}"


def _parts(names: Sequence[str]) -> list[Sequence[str]]:
    """Divides settings over tables that fit the width of a page."""
    return [names[start : start + _COLUMNS] for start in range(0, len(names), _COLUMNS)]


def _cell(comparison: Comparison, metric: str) -> str:
    value, low, high = comparison.difference
    text = _number(value) if metric == SPEED else f"{_number(value, sign=True)}"
    if low is not None:
        sign = metric != SPEED
        text += f" [{_number(low, sign=sign)}, {_number(high, sign=sign)}]"
    if metric != SPEED and comparison.baseline:
        text += f" ({100 * value / abs(comparison.baseline):+.1f} %)"
    return f"**{text}**" if comparison.clear else text


def _percent(comparison: Comparison) -> str:
    if not comparison.baseline:
        return ""
    scale = 100 / abs(comparison.baseline)
    if len(comparison.differences) < FEW:
        return ", ".join(f"{scale * difference:+.1f}" for difference in comparison.differences)
    value, low, high = (scale * x for x in comparison.difference)
    text = f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if comparison.clear else text


def _notes(results: Sequence[Result], table: Table) -> str:
    """Explains how the intervals were computed, and what they do not show."""
    counts = sorted({len(pairs(results, name)) for name in table})
    lines = [
        "↓: lower is better, ↑: higher is better. Bold: the interval excludes zero difference. "
        "Runs were timed one after the other; `step_overhead.py` times steps in turn."
    ]
    several = [count for count in counts if count > 1]
    if several:
        number = str(several[0]) if len(several) == 1 else f"{several[0]} to {several[-1]}"
        lines.append(f"Intervals are those of a paired t over {number} seeds.")
    if 1 in counts:
        lines.append(
            "The intervals of a single seed are over its samples (held-out loss: images), and say "
            "nothing about other seeds."
        )
    if several and several[0] < FEW:
        lines.append(
            f"With fewer than {FEW} seeds, the intervals are wide and assume normal differences."
        )
    if table:
        tests = sum(map(len, table.values()))
        lines.append(
            f"Of these {tests} comparisons, one in twenty would be bold without any difference."
        )
    return " ".join(lines)


def _plain(results: Sequence[Result], table: Table) -> dict:
    """All runs and comparisons as plain data."""
    return {
        "runs": [{"folder": str(result.folder), **result.found} for result in results],
        "comparisons": {
            name: {
                metric: {
                    **c.difference._asdict(),
                    "pairs": c.differences,
                    "within_runs": c.within,
                    "baseline": c.baseline,
                }
                for metric, c in found.items()
            }
            for name, found in table.items()
        },
    }


def _plot(table: Table, path: pathlib.Path) -> None:
    """Plots differences of all settings, intervals and pairs, with a panel for each metric."""
    from matplotlib.figure import Figure as Canvas

    metrics = list(dict.fromkeys(metric for found in table.values() for metric in found))
    columns, height = 4, 1.1 + 0.3 * len(table)
    rows = -(-len(metrics) // columns)
    canvas = Canvas(figsize=(3.4 * columns, height * rows), layout="constrained")
    panels = canvas.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    names = list(table)
    for panel, metric in zip(panels, metrics, strict=False):
        panel.axvline(float(metric == SPEED), color="#9aa5b1", linewidth=1)
        for place, name in enumerate(names):
            if metric not in table[name]:
                continue
            draw_row(panel, place, table[name][metric])
        panel.set_title(title(metric), fontsize=9)
        panel.tick_params(labelsize=8)
        panel.locator_params(axis="x", nbins=4)
    panels[0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    for panel in panels[len(metrics) :]:
        panel.set_axis_off()
    canvas.suptitle(
        "Setting minus baseline (steps/s: ratio): mean, 95 % interval, every seed in grey",
        fontsize=10,
    )
    canvas.savefig(path, dpi=130)


def draw_row(panel: Any, place: int, comparison: Comparison, *, scale: float = 1.0) -> None:
    """Draws one comparison as a row of a panel: every pair, their mean and its interval."""
    value, low, high = (None if x is None else scale * x for x in comparison.difference)
    color = "#d9730d" if comparison.clear else "#2563a8"
    if low is not None:
        panel.plot([low, high], [place, place], color=color, linewidth=2, zorder=2)
    pairs = [scale * difference for difference in comparison.differences]
    panel.scatter(pairs, [place] * len(pairs), s=10, color="#9aa5b1", zorder=3)
    panel.scatter([value], [place], s=32, color=color, zorder=4)


def _plot_times(results: Sequence[Result], names: Sequence[str], path: pathlib.Path) -> None:
    """Plots the held-out loss of the baseline by time, and the differences of the settings.

    Times are left out where the loss is so small that percentages of it say nothing.
    """
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(11, max(4, 1 + 0.22 * len(names))), layout="constrained")
    left, right = canvas.subplots(1, 2)
    found = {name: loss_by_time(results, name) for name in names}
    times, base, _ = found[names[-1]]
    left.plot(times, base, marker=".", color="black")
    left.set(title=f"{LOSS} of the baseline", xlabel="t / T", ylim=(0, None))
    seen = base > _NEGLIGIBLE * base.max()
    draw = _draw_lines if len(names) <= 2 * _COLUMNS else _draw_colors
    draw(right, times[seen], {n: np.array(f)[seen] for n, (_, _, f) in found.items()})
    right.set(title="difference from the baseline, %", xlabel="t / T")
    canvas.savefig(path, dpi=130)


def _draw_lines(panel: Any, times: np.ndarray, differences: Mapping[str, np.ndarray]) -> None:
    """Draws settings as lines, with their intervals if they have them."""
    for name, columns in differences.items():
        (line,) = panel.plot(times, columns[:, 0].astype(float), marker=".", label=name)
        if columns[0, 1] is not None:
            low, high = columns[:, 1:].astype(float).T
            panel.fill_between(times, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    panel.axhline(0, color="#9aa5b1", linewidth=1)
    panel.legend(fontsize=8)


def _draw_colors(panel: Any, times: np.ndarray, differences: Mapping[str, np.ndarray]) -> None:
    """Draws many settings as rows of colours."""
    values = np.stack([columns[:, 0].astype(float) for columns in differences.values()])
    reach = np.abs(values).max()
    rows = range(len(values))
    mesh = panel.pcolormesh(times, rows, values, cmap="RdBu_r", vmin=-reach, vmax=reach)
    panel.set_yticks(rows, list(differences), fontsize=7)
    panel.invert_yaxis()
    panel.figure.colorbar(mesh)


def _number(value: float, *, sign: bool = False) -> str:
    return f"{value:{'+' if sign else ''}.3g}"
