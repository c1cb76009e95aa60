"""Where a run writes its metrics, sample grids and texts.

    TensorBoard         events in the workdir, where TensorFlow is installed
    <workdir>/metrics.jsonl    all numbers, always: one JSON object for each time of writing
    W&B                 on demand; the workdir keeps the id of the run there in wandb_id.txt

`common/metric_rows.py` reads the lines of metrics.jsonl. A run that continues removes the lines of
the steps that it does again, so that each number of a step is there once.

Files in a bucket cannot grow. There, the first two are written to a folder of this machine, which
is copied to the workdir once a minute and at the end.
"""

import importlib.util
import json
import math
import os
import pathlib
import sys
import tempfile
import time
import uuid
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from conprediff_jax.common import buckets
from conprediff_jax.common.errors import FieldError, UserError, first_line
from conprediff_jax.common.files import is_address, write_atomically, write_new, write_text
from conprediff_jax.common.metric_rows import METRICS, parsed

ALWAYS = ("tensorboard", "jsonl")  # events need TensorFlow, which an extra installs
OPTIONAL = ("wandb",)
PROJECT = "conprediff_jax"

_ID = "wandb_id.txt"
_EVERY = 60  # seconds between two copies to a bucket


class Log:
    """Something that a run is written to. It leaves out what it has no place for."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers of a step."""

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes an image of a step, uint8 [height, width, 3]."""

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a text, of one or many lines."""

    def config(self, config: Mapping[str, Any]) -> None:
        """Writes the config of the run, as plain data."""

    def close(self) -> None:
        """Finishes writing."""


def check(names: Collection[str]) -> None:
    """Checks, before anything is computed, that a run can be written to all logs.

    Raises:
        UserError: There is no log of a name, or its library is not installed.
    """
    known = ALWAYS + OPTIONAL
    for name in names:
        if name not in known:
            raise FieldError("log", f"has {name!r}: the logs are {', '.join(known)}")
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise UserError("log has wandb, which is not installed: pip install wandb")


def open_logs(workdir: str, names: Collection[str], first_step: int) -> list[Log]:
    """Opens the logs of a run.

    Args:
        workdir: The workdir of the run.
        names: Names of logs besides `ALWAYS`.
        first_step: Number of steps that were done before the program started.

    Raises:
        UserError: W&B cannot be reached, or knows no user.
    """
    copies = [Copies(workdir)] if buckets.is_bucket(workdir) else []
    folder = copies[0].folder if copies else workdir
    logs = [JsonLines(folder, first_step)]
    if importlib.util.find_spec("tensorflow"):
        logs.append(TensorBoard(folder))
    else:
        logging.info(
            'metrics go to %s alone: pip install -e ".[tfds]" for events of TensorBoard', METRICS
        )
    if "wandb" in names:
        logs.append(WeightsAndBiases(workdir))
    return logs + copies  # which are the last, since they copy what the others have written


class Copies(Log):
    """Copies logs to a workdir in a bucket.

    Attributes:
        folder: The folder of this machine in which the logs are, with `metrics.jsonl` as it is in
            the workdir.
    """

    def __init__(self, workdir: str):
        self._aside = tempfile.TemporaryDirectory(prefix="logs-")
        self.folder, self._workdir = self._aside.name, workdir
        self._copied_at = time.monotonic()
        if (epath.Path(workdir) / METRICS).exists():
            write_text(
                epath.Path(self.folder) / METRICS, (epath.Path(workdir) / METRICS).read_text()
            )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Copies what the logs before this one have written, if that is due."""
        if time.monotonic() - self._copied_at > _EVERY:
            self._copy()

    def close(self) -> None:
        """Copies all that the logs have written, and removes the folder."""
        self._copy()
        self._aside.cleanup()

    def _copy(self) -> None:
        for path in sorted(pathlib.Path(self.folder).iterdir()):
            content = path.read_bytes()
            write_atomically(epath.Path(self._workdir) / path.name, lambda f, c=content: f.write(c))
        self._copied_at = time.monotonic()


class TensorBoard(Log):
    """Events for TensorBoard, written by a thread of its own."""

    def __init__(self, workdir: str):
        # This import takes seconds, and only events need it.
        import tensorflow as tf
        from clu import metric_writers

        tf.config.set_visible_devices([], "GPU")  # the accelerators are JAX's
        self._writer = metric_writers.AsyncWriter(metric_writers.SummaryWriter(workdir))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers of a step."""
        self._writer.write_scalars(step, values)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes an image of a step, uint8 [height, width, 3]."""
        self._writer.write_images(step, {name: image[None]})

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a text in a font of fixed width."""
        indented = "\n".join(f"    {line}" for line in text.splitlines())
        self._writer.write_texts(step, {name: indented})

    def close(self) -> None:
        """Finishes writing."""
        self._writer.close()


class JsonLines(Log):
    """The numbers of a run in `metrics.jsonl`, one JSON object in a line."""

    def __init__(self, workdir: str, first_step: int):
        path = epath.Path(workdir) / METRICS
        if path.exists():
            lines = path.read_text().splitlines()
            kept = [line for line in lines if (row := parsed(line)) and row["step"] <= first_step]
            write_text(path, "".join(f"{line}\n" for line in kept))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers of a step; those that are not finite become null."""
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: n if math.isfinite(n) else None for name, n in numbers.items()}
        row = {"step": step, "time": round(time.time(), 3), **finite}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Finishes writing."""
        self._file.close()


class WeightsAndBiases(Log):
    """A run on W&B, or its files in the workdir in W&B's offline mode.

    The client reads who and where from the environment: WANDB_API_KEY, WANDB_PROJECT,
    WANDB_ENTITY and WANDB_MODE. It reports the use of the machine itself. Texts are files of the
    run. Steps that the run on W&B has already are not written again.
    """

    def __init__(self, workdir: str):
        import wandb

        self._image = wandb.Image
        try:
            self._run = wandb.init(
                id=_run_id(workdir),
                resume="allow",
                name=os.path.basename(os.path.normpath(workdir)),
                project=os.environ.get("WANDB_PROJECT") or PROJECT,
                dir=None if is_address(workdir) else os.path.abspath(workdir),
            )
        except wandb.Error as error:
            raise UserError(
                f"log has wandb, which does not begin: {first_line(error)}; `wandb login` stores a "
                "key, and WANDB_MODE=offline writes to the workdir alone"
            ) from error

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers of a step."""
        self._log(step, dict(values))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes an image of a step, uint8 [height, width, 3]."""
        self._log(step, {name: self._image(image)})

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step >= self._run.step:  # W&B drops earlier steps, with a warning for each
            self._run.log(values, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a text as a file of the run."""
        (pathlib.Path(self._run.dir) / f"{name}.txt").write_text(text + "\n")

    def config(self, config: Mapping[str, Any]) -> None:
        """Writes the config of the run, which replaces that of its last start."""
        self._run.config.update(dict(config), allow_val_change=True)

    def close(self) -> None:
        """Ends the run, as failed if an error is on its way."""
        self._run.finish(exit_code=int(sys.exc_info()[0] is not None))


def _run_id(workdir: str) -> str:
    """The id of a run on W&B, which its workdir keeps from its first start on."""
    path = epath.Path(workdir) / _ID
    write_new(path, lambda file: file.write(f"{uuid.uuid4().hex[:12]}\n".encode()))
    return path.read_text().strip()
