"""Several studies in one figure: what context prediction changes, in percent, metric by metric."""

import pathlib
from collections.abc import Mapping

from study.compare import compare, load
from study.report import draw_row, title

# Metrics of whole samples, of the denoiser, and of local structure.
METRICS = (
    "FD-random-VGG16",
    "precision-random-VGG16",
    "recall-random-VGG16",
    "2 x 2 patterns, total variation",
    "held-out loss",
    "difference W2, radius 1, points",
    "difference W2, radius 2, points",
    "difference W2, radius 3, points",
)
_LIMIT = 40  # percent


def draw(studies: Mapping[str, tuple[pathlib.Path, str]], path: pathlib.Path) -> None:
    """Draws mean differences in percent, 95 % intervals and all pairs, with a panel per study.

    Args:
        studies: Folders of the studies by their titles, each with the name of the setting that is
            compared with the baseline.
        path: Path of the picture.

    Raises:
        FileNotFoundError: A study has no pair of its setting.
    """
    from matplotlib.figure import Figure

    found = {name: compare(load(folder), setting) for name, (folder, setting) in studies.items()}
    for name, (folder, setting) in studies.items():
        if not found[name]:
            raise FileNotFoundError(f"{folder}: no pair of {setting!r} has been measured there")
    canvas = Figure(figsize=(2.6 + 2.2 * len(found), 3.2), layout="constrained")
    panels = canvas.subplots(1, len(found), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (name, comparisons) in zip(panels, found.items(), strict=True):
        panel.axvline(0, color="#9aa5b1", linewidth=1)
        for place, metric in enumerate(METRICS):
            # Where a point is a single pixel or token, the plain metric is the one on the points.
            same = metric.removesuffix(", points")
            comparison = comparisons.get(metric, comparisons.get(same))
            if comparison:
                draw_row(panel, place, comparison, scale=100 / abs(comparison.baseline))
        pairs = len(next(iter(comparisons.values())).differences)
        panel.set_title(f"{name}, {pairs} pairs", fontsize=10)
        panel.set_xlabel("change, %", fontsize=9)
        panel.tick_params(labelsize=8)
    panels[0].set_xlim(-_LIMIT, _LIMIT)
    labels = [title(metric) for metric in METRICS]
    panels[0].set(yticks=range(len(METRICS)), yticklabels=labels, ylim=(len(METRICS) - 0.5, -0.5))
    canvas.suptitle(
        "With context prediction, against the same run without: mean, 95 % interval, every pair\n"
        "↓ lower is better, ↑ higher; orange: the interval excludes zero; "
        "lines that meet an edge continue beyond it",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=130)
