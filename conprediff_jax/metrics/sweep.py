"""A plot of the figures of several evaluations over the settings in which these differ."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from conprediff_jax.common import extras
from conprediff_jax.common.files import write_atomically
from conprediff_jax.metrics.bootstrap import Figure

Found = Sequence[tuple[Mapping[str, Any], Mapping[str, Figure]]]


def plot(path: pathlib.Path, found: Found, title: str) -> None:
    """Writes a PNG with a panel for each metric.

    The first setting with several values is the axis, and every combination of the others is a line
    with the intervals of its figures.

    Args:
        path: The PNG.
        found: For every evaluation, the settings that were varied and the figures by metric.
        title: The heading.
    """
    pyplot = extras.pyplot()
    keys = [key for key in found[0][0] if len({point[key] for point, _ in found}) > 1]
    axis, *others = keys or list(found[0][0])
    names = list(dict.fromkeys(name for _, figures in found for name in figures))
    panels, axes = pyplot.subplots(
        1, len(names), figsize=(3.6 * len(names), 3.4), layout="constrained", squeeze=False
    )
    lines: dict[str, list[tuple[Any, Mapping[str, Figure]]]] = {}
    for point, figures in found:
        label = ", ".join(f"{key} {point[key]}" for key in others)
        lines.setdefault(label, []).append((point[axis], figures))
    for panel, name in zip(axes[0], names, strict=True):
        for label, row in lines.items():
            row = sorted((x, figures[name]) for x, figures in row if name in figures)
            xs, shown = [x for x, _ in row], [figure for _, figure in row]
            (drawn,) = panel.plot(xs, [f.value for f in shown], "o-", label=label)
            if shown and shown[0].low is not None:
                low, high = [f.low for f in shown], [f.high for f in shown]
                panel.fill_between(xs, low, high, color=drawn.get_color(), alpha=0.15, lw=0)
        panel.set(title=name, xlabel=axis)
        panel.grid(alpha=0.3)
    if others:
        axes[0][0].legend(fontsize="small")
    panels.suptitle(title, fontsize="medium")
    write_atomically(path, lambda file: panels.savefig(file, dpi=120, format="png"))
    pyplot.close(panels)
