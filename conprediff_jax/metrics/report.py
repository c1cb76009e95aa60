"""Writes an evaluation as one HTML page that contains its pictures, and as PNGs beside it."""

import base64
import dataclasses
import html
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from conprediff_jax.common import images
from conprediff_jax.common.files import write_text
from conprediff_jax.metrics.bootstrap import Figure

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1d2730; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { padding: .3rem 1.2rem .3rem 0; text-align: left;
       border-bottom: 1px solid #dde3e8; } td.number { text-align: right;
       font-variant-numeric: tabular-nums; }
img { max-width: 100%; border: 1px solid #dde3e8; } p.note { color: #52616d; }
"""

_BLUE, _ORANGE, _GREY, _INK = "#2563a8", "#d9730d", "#dde3e8", "#1d2730"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of the report.

    Attributes:
        file: Name of the PNG, without the ending.
        title: Heading above the picture.
        note: What the picture shows.
        pixels: The picture, uint8.
    """

    file: str
    title: str
    note: str
    pixels: UInt8[np.ndarray, "height width 3"]


def table(figures: Mapping[str, Figure]) -> str:
    """The figures with their intervals as plain text, one per line."""
    width = max(map(len, figures))
    lines = []
    for name, figure in figures.items():
        line = f"{name:{width}}  {_number(figure.value):>10}"
        if figure.low is not None:
            line += f"   [{_number(figure.low)}, {_number(figure.high)}]"
        lines.append(line)
    return "\n".join(lines)


def write(
    folder: pathlib.Path,
    *,
    title: str,
    about: Mapping[str, str],
    figures: Mapping[str, Figure],
    pictures: Sequence[Picture],
) -> pathlib.Path:
    """Writes `report.html` and the PNGs.

    Args:
        folder: The folder of the report.
        title: Heading of the page.
        about: What was compared, in words.
        figures: Figures by name of the metric.
        pictures: Pictures in the order of the page.

    Returns:
        The path of the page.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", _rows(about), "<h2>Metrics</h2>", _metrics(figures)]
    for picture in pictures:
        path = folder / f"{picture.file}.png"
        images.write_png(path, picture.pixels)
        parts.append(
            f"<h2>{html.escape(picture.title)}</h2>"
            f'<p class="note">{html.escape(picture.note)}</p>'
            f"{embedded(picture.title, path.read_bytes())}"
        )
    written = folder / "report.html"
    write_text(written, page(title, parts))
    return written


def page(title: str, parts: Sequence[str]) -> str:
    """An HTML page in the style of the reports, of parts that are HTML themselves."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def embedded(title: str, png: bytes) -> str:
    """The HTML of a picture that the page holds itself."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def neighbors_picture(
    samples: UInt8[np.ndarray, "rows height width 3"],
    nearest: UInt8[np.ndarray, "rows k height width 3"],
) -> UInt8[np.ndarray, "_height _width 3"]:
    """Rows that begin with a sample, and show its nearest neighbours after a white column."""
    blank = np.full_like(samples[:, None], 255)
    rows = np.concatenate([samples[:, None], blank, nearest], axis=1)
    return images.grid(rows.reshape(-1, *samples.shape[1:]), columns=rows.shape[1])


def precision_recall_picture(
    curve: Float[np.ndarray, "points 2"], labels: Sequence[str], precision: Figure, recall: Figure
) -> UInt8[np.ndarray, "_height _width 3"]:
    """A plot of precision over recall: a curve over k, and the reported point with its intervals.

    Args:
        curve: Recall and precision for every k.
        labels: Labels of the points of the curve.
        precision: The reported precision.
        recall: The reported recall.
    """
    size, margin = 480, 56
    image = Image.new("RGB", (size + 2 * margin, size + 2 * margin), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(14)

    def place(x: float, y: float) -> tuple[float, float]:
        return margin + x * size, margin + (1 - y) * size

    for tick in np.linspace(0, 1, 6):
        draw.line([place(tick, 0), place(tick, 1)], _GREY)
        draw.line([place(0, tick), place(1, tick)], _GREY)
        x, y = place(tick, 0)
        draw.text((x, y + 6), f"{tick:.1f}", _INK, font, "ma")
        x, y = place(0, tick)
        draw.text((x - 6, y), f"{tick:.1f}", _INK, font, "rm")
    draw.text((margin + size / 2, 2 * margin + size - 22), "recall", _INK, font, "ma")
    draw.text((margin, margin - 20), "precision", _INK, font, "mm")
    draw.line([place(*point) for point in curve], _BLUE, 2)
    for point, label in zip(curve, labels, strict=True):
        x, y = place(*point)
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), _BLUE)
        draw.text((x + 7, y + 4), label, _BLUE, font)
    x, y = recall.value, precision.value
    if precision.low is not None:
        draw.line([place(recall.low, y), place(recall.high, y)], _ORANGE, 3)
        draw.line([place(x, precision.low), place(x, precision.high)], _ORANGE, 3)
    x, y = place(x, y)
    draw.ellipse((x - 6, y - 6, x + 6, y + 6), _ORANGE)
    return np.asarray(image)


def _metrics(figures: Mapping[str, Figure]) -> str:
    rows = ["<tr><th>Metric<th>Value<th>95 % interval</tr>"]
    for name, figure in figures.items():
        interval = ""
        if figure.low is not None:
            interval = f"{_number(figure.low)} to {_number(figure.high)}"
        value = _number(figure.value)
        rows.append(f'<tr><td>{html.escape(name)}<td class="number">{value}<td>{interval}</tr>')
    return f"<table>{''.join(rows)}</table>"


def _rows(about: Mapping[str, str]) -> str:
    rows = (f"<tr><th>{html.escape(k)}<td>{html.escape(v)}</tr>" for k, v in about.items())
    return f"<table>{''.join(rows)}</table>"


def _number(value: float) -> str:
    return f"{value:.5g}"
