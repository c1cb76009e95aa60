"""What a run has written to its workdir so far: numbers and sample grids."""

import io
import math
import re
import time
from typing import NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from conprediff_jax.common import hub, metric_rows
from conprediff_jax.common.metric_rows import Row
from conprediff_jax.common.progress import clock

_MOST = 400  # points of a curve


class Point(NamedTuple):
    """A point of a curve: the step, the name of the curve, and its value."""

    step: int
    curve: str
    value: float


class RunLog(NamedTuple):
    """The log of a run.

    Attributes:
        rows: The lines of metrics.jsonl, in order.
        grids: The sample grids by step, in order.
    """

    rows: list[Row]
    grids: dict[int, epath.Path]

    @property
    def groups(self) -> list[str]:
        """The beginnings of the names of numbers: 'loss' of 'loss' and 'loss/context'."""
        names = (name.partition("/")[0] for row in self.rows for name in row)
        found = sorted(set(names) - {"step", "time"})
        return sorted(found, key=lambda name: name != "loss")

    def curves(self, group: str) -> list[Point]:
        """The numbers of a group, with at most 400 steps of each, the last one among them."""
        chosen = [row for row in self.rows if any(_is_of(name, group) for name in row)]
        stride = math.ceil(len(chosen) / _MOST) or 1
        return [
            Point(row["step"], name, value)
            for row in chosen[::-1][::stride][::-1]
            for name, value in row.items()
            if _is_of(name, group) and value is not None
        ]

    def said(self) -> str:
        """Where the run is, in words."""
        if not self.rows:
            return "This run has written no numbers yet."
        step, ago = self.rows[-1]["step"], clock(max(0, time.time() - self.rows[-1]["time"]))
        speeds = [speed for row in self.rows if (speed := row.get("speed/steps_per_second"))]
        speed = f", {speeds[-1]:.2f} steps a second" if speeds else ""
        return f"**Step {step:,}**{speed}, last written {ago} ago"


def _is_of(name: str, group: str) -> bool:
    return name == group or name.startswith(f"{group}/")


def read(workdir: str) -> RunLog:
    """Reads the log of a run, which may be writing it."""
    folder = epath.Path(hub.results_folder(workdir))
    found = {}
    for file in (folder / "samples").glob("step_*.png"):
        if match := re.fullmatch(r"step_(\d+)\.png", file.name):
            found[int(match[1])] = file
    return RunLog(metric_rows.read(folder), dict(sorted(found.items())))


def read_grid(file: epath.Path) -> np.ndarray:
    """The pixels of a sample grid."""
    return np.asarray(Image.open(io.BytesIO(file.read_bytes())))
