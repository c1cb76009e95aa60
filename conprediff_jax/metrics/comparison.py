"""A page on which the evaluations of two runs stand side by side."""

import dataclasses
import html
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from conprediff_jax.common import extras, metric_rows
from conprediff_jax.common.files import write_text
from conprediff_jax.common.metric_rows import Row
from conprediff_jax.common.trees import flatten
from conprediff_jax.metrics import report
from conprediff_jax.metrics.bootstrap import Figure
from conprediff_jax.metrics.results import figure_text

CURVES = ("loss", "loss/denoise", "loss/context")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One side of the page.

    Attributes:
        name: The name of the run.
        settings: All that its figures depend on.
        figures: The figures by metric.
        samples: A grid of samples, uint8.
    """

    name: str
    settings: Mapping[str, Any]
    figures: Mapping[str, Figure]
    samples: UInt8[np.ndarray, "height width 3"]

    def log(self) -> list[Row]:
        """The numbers that the run has written."""
        return metric_rows.read(self.settings["workdir"])


def write(path: pathlib.Path, sides: Sequence[Evaluated]) -> None:
    """Writes the page: figures, settings that differ, samples of the same seed, losses by step.

    Args:
        path: The HTML file, which holds its pictures.
        sides: The evaluations.
    """
    title = " and ".join(side.name for side in sides)
    names = list(dict.fromkeys(name for side in sides for name in side.figures))
    found = [[name, *(_shown(side.figures.get(name)) for side in sides)] for name in names]
    flat = [flatten(side.settings) for side in sides]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    differ = [key for key in keys if len({str(s.get(key, "")) for s in flat}) > 1]
    settings = [[key, *(str(s.get(key, "")) for s in flat)] for key in differ]
    heads = ["", *(side.name for side in sides)]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        "<h2>Metrics</h2>", _table(heads, found),
        "<h2>Settings that differ</h2>", _table(heads, settings),
        "<h2>Samples of the same seed</h2>", _row(
            [(side.name, _png(side.samples)) for side in sides]
        ),
    ]  # fmt: skip
    curves = _curves(sides)
    if curves:
        parts += ["<h2>Losses</h2>", report.embedded("losses by step", curves)]
    write_text(path, report.page(title, parts))


def _shown(figure: Figure | None) -> str:
    return figure_text(figure and figure._asdict())


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _row(pictures: Sequence[tuple[str, bytes]]) -> str:
    cells = [
        f'<figure style="flex:1;margin:0"><figcaption>{html.escape(name)}</figcaption>'
        f"{report.embedded(name, png)}</figure>"
        for name, png in pictures
    ]
    return f'<div style="display:flex;gap:1rem">{"".join(cells)}</div>'


def _png(pixels: UInt8[np.ndarray, "height width 3"]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _curves(sides: Sequence[Evaluated]) -> bytes:
    """A PNG of the losses of all runs by step; empty where no run has them."""
    pyplot = extras.pyplot()
    logs = [(side.name, side.log()) for side in sides]
    names = [name for name in CURVES if any(name in line for _, lines in logs for line in lines)]
    if not names:
        return b""
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(4 * len(names), 3), layout="constrained", squeeze=False
    )
    for panel, name in zip(axes[0], names, strict=True):
        for run, lines in logs:
            points = [(line["step"], line[name]) for line in lines if line.get(name)]
            if points:
                panel.semilogy(*zip(*points, strict=True), label=run)
        panel.set(title=name, xlabel="step")
        panel.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
    return file.getvalue()
