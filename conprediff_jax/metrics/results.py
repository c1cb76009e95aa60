"""Tables of results: every figure stands with all that it depends on.

    <name>.json    a list of rows, newest first
    <name>.md      the same rows as a table for people

A row has the settings that `sampling/record.py` writes and those of the metric, the figures, and
the time at which they were computed. New figures of settings that the table has replace those in
their own row; figures of other settings get a row of their own.
"""

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import write_text
from conprediff_jax.common.trees import flatten
from conprediff_jax.metrics.bootstrap import Figure
from conprediff_jax.sampling.record import difference

Row = dict[str, Any]


class ResultsTable:
    """Figures by settings, which are written to a file as soon as they are added.

    Args:
        path: The JSON file. If it exists, its rows are read. A file of an earlier version, which
            has no rows, is kept as `<name>.old.json`.

    Raises:
        UserError: The file exists and holds no results.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = epath.Path(path)
        _set_aside(self.path)
        self.rows = read_rows(self.path)

    def find(self, settings: Mapping[str, Any]) -> Row | None:
        """The row of these settings; None if there is none."""
        settings = json.loads(json.dumps(settings))
        return next((row for row in self.rows if not difference(row["settings"], settings)), None)

    def add(self, settings: Mapping[str, Any], figures: Mapping[str, Figure], **more: Any) -> None:
        """Adds figures to the row of their settings, and writes the table.

        Rows that other programs added to the file meanwhile are kept.

        Args:
            settings: All that the figures depend on, as plain data.
            figures: Figures by name of the metric.
            **more: Further entries of the row, such as the losses at every time.
        """
        self.rows = read_rows(self.path)
        old = self.find(settings)
        row = {
            "time": datetime.datetime.now().isoformat(sep=" ", timespec="seconds"),
            "settings": json.loads(json.dumps(settings)),
            "metrics": old["metrics"] if old else {},
            **more,
        }
        row["metrics"] |= {name: figure._asdict() for name, figure in figures.items()}
        self.rows = [row, *(other for other in self.rows if other is not old)]
        write_text(self.path, json.dumps(self.rows, indent=2) + "\n")
        write_text(self.path.with_suffix(".md"), markdown(self.rows))


def _set_aside(path: epath.Path) -> None:
    """Renames results of an earlier version, which are a dict."""
    try:
        old = path.exists() and isinstance(json.loads(path.read_text()), dict)
    except (OSError, ValueError):
        return  # `read_rows` says what is wrong
    if old:
        kept = path.with_suffix(".old.json")
        path.rename(kept)
        logging.info("%s: results of an earlier version, kept as %s", path, kept.name)


def read_rows(path: epath.Path) -> list[Row]:
    """The rows of a table, newest first; none if the file does not exist.

    Raises:
        UserError: The file holds no such rows.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
        if isinstance(rows, dict):  # of an earlier version, which did not say what they depend on
            return []
        if not isinstance(rows, list):
            raise TypeError("a list is expected")
        for row in rows:
            dict(**row["settings"])
            for figure in row["metrics"].values():
                Figure(**figure)
        return rows
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not a table of results: move it away") from error


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, after a list of the settings that all rows share."""
    flat = [flatten(row["settings"]) for row in rows]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    varied = [key for key in keys if any(s.get(key) != flat[0].get(key) for s in flat)]
    shared = [f"* {key}: {_text(flat[0][key])}" for key in keys if key not in varied]
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    table = [["time", *names, *varied], ["---"] * (1 + len(names) + len(varied))]
    for row, settings in zip(rows, flat, strict=True):
        figures = [figure_text(row["metrics"].get(name)) for name in names]
        table.append([row["time"], *figures, *(_text(settings.get(key, "")) for key in varied)])
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    return "\n".join([*lines, "", "The same in all rows:", "", *shared]) + "\n"


def figure_text(figure: Mapping[str, Any] | None) -> str:
    """A figure with its interval, such as '12.3 [11.9, 12.8]'; '' for None."""
    if figure is None:
        return ""
    text = f"{figure['value']:.4g}"
    if figure.get("low") is not None:
        text += f" [{figure['low']:.4g}, {figure['high']:.4g}]"
    return text


def _text(value: Any) -> str:
    """A setting in a cell: on one line, and not too long."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    return text if len(text) <= 80 else f"{text[:77]}..."
