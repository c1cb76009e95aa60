"""The workdirs that the page shows, with their models."""

import contextlib
import dataclasses
from collections.abc import Iterator

import gradio as gr

from conprediff_jax.runs.api import Model


class Meter:
    """Tells the event that draws how far a model is; the model reports to it.

    The page draws one batch of images after the other, and a model reports the calls of the network
    for each batch anew.
    """

    def __init__(self):
        self._progress: gr.Progress | None = None
        self._batches = self._finished = 0

    @contextlib.contextmanager
    def shown_by(self, progress: gr.Progress, batches: int = 1) -> Iterator[None]:
        """Within this context, the model's reports go to the progress bar of an event.

        Args:
            progress: The progress bar.
            batches: Number of batches that are drawn.
        """
        self._progress, self._batches, self._finished = progress, batches, 0
        progress(0, desc="Compiling; this happens once for each setting")
        try:
            yield
        finally:
            self._progress = None

    def __call__(self, done: int, calls: int) -> None:
        """Takes a report; see `drawing.Report`."""
        if self._progress is None:
            return
        total = self._batches * calls
        before = self._finished * calls + done
        self._progress((before, total), desc="Drawing", unit="calls of the network")
        self._finished += done == calls


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """A workdir that the page shows.

    Attributes:
        name: Its name on the page, which no other workdir has.
        workdir: Its path or address.
        model: Its model; None for a run that has written no checkpoint yet, or that trains a first
            stage.
        meter: What the model reports to.
        batch_size: Number of images that are drawn at a time.
    """

    name: str
    workdir: str
    model: Model | None
    meter: Meter
    batch_size: int

    @property
    def is_small(self) -> bool:
        """Whether images have so few pixels that they are shown as squares, not smoothed."""
        return self.model is None or min(self.model.diffusion.image_shape) < 256

    @property
    def classes(self) -> list[str] | None:
        """The names of the classes, or their numbers without names; None without classes."""
        if self.model is None or not self.model.num_classes:
            return None
        return list(self.model.class_names) or list(map(str, range(self.model.num_classes)))
