"""The numbers of a run: `metrics.jsonl` in its workdir, with one JSON object for each writing.

A row holds `step`, `time` (seconds since 1970) and the numbers by name. A number that is not finite
is None.
"""

import json
import os

from etils import epath

METRICS = "metrics.jsonl"

Row = dict[str, int | float | None]


def read(folder: str | os.PathLike[str]) -> list[Row]:
    """The rows of a run, in order; none where it has not written any.

    The run may be writing: a line that it has not finished is left out.

    Args:
        folder: The workdir, or the address of one in a bucket.
    """
    file = epath.Path(folder) / METRICS
    lines = file.read_text().splitlines() if file.exists() else []
    return [row for line in lines if (row := parsed(line))]


def parsed(line: str) -> Row | None:
    """The row of a line; None for a line that is not whole."""
    try:
        row = json.loads(line)
        return row if isinstance(row["step"], int) and isinstance(row["time"], float) else None
    except (ValueError, KeyError, TypeError):  # the program was killed within the line
        return None
