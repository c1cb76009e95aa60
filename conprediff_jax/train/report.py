"""The log of a run: its progress, its metrics, and an error when the loss diverges."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from conprediff_jax.common.errors import UserError
from conprediff_jax.common.progress import Progress
from conprediff_jax.tasks.spec import TrainSpec
from conprediff_jax.train.logs import open_logs
from conprediff_jax.train.throughput import WAITING, Clock, MeasuredStep

_SOON = 10.0  # seconds after compiling to a line with the time left, where none is due before


class DivergedError(UserError):
    """The loss or its gradient became NaN or infinite."""


class Reporter:
    """Collects the metrics of every step, and does not wait for the device until they are due.

    Args:
        workdir: The folder into which the first process writes its logs.
        spec: The number of steps, the batch size, and how often to log.
        first_step: Number of steps that were done before the program started.
        last_good: A function that returns the path of the last good checkpoint.
        began: Time at which the program started, by `time.monotonic`; by default now.
        log: Names of logs besides those that every run has; see `logs.open_logs`.
    """

    def __init__(
        self,
        workdir: str,
        spec: TrainSpec,
        first_step: int,
        last_good: Callable[[], str],
        began: float | None = None,
        log: Collection[str] = (),
    ):
        self.progress = Progress(spec.steps, first_step, bar=jax.process_index() == 0)
        self._spec, self._last_good = spec, last_good
        self._running = self._estimated = False
        self._said = ""  # what stands behind the bar
        self._clock = Clock(began)
        self._measured: MeasuredStep | None = None
        self._peak_share: float | None = None
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._logs = [] if jax.process_index() else open_logs(workdir, log, first_step)

    def measure(self, train_step: MeasuredStep) -> None:
        """Sets the step whose use of the device is logged if the device's peak is known."""
        self._measured = train_step

    def fetch(self, batches: Iterator[Any]) -> Any:
        """Returns the next batch, and logs the time that the device waits for it."""
        last = next(iter(self._pending[-1][1].values())) if self._pending else None
        return self._clock.fetch(batches, last)

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Adds the metrics of a step; logs and writes their means when `log_every` is due.

        Raises:
            DivergedError: A metric is NaN or infinite.
        """
        self._pending.append((step, metrics))
        if not self._running:  # the first step compiles, which is not part of the speed
            jax.block_until_ready(metrics)
            if self._measured and jax.process_index() == 0:
                self._peak_share = self._measured.peak_share()
            self._clock.reset()
            self.progress.mark(step)
            self.progress.restart()
            self._running = True
        self.progress.draw(step, said=self._said)
        if step % self._spec.log_every == 0 or step == self._spec.steps:
            self._write(step)
        elif self._line_is_due():
            jax.block_until_ready(metrics)
            speed = self.progress.speed(step)
            logging.info(
                "step %d/%d  %.2f steps/s  %s left",
                step, self._spec.steps, speed, self.progress.left(speed, step),
            )  # fmt: skip
            self._estimated = True

    def _line_is_due(self) -> bool:
        """Whether to say how long the run takes, before its metrics are due."""
        if self._estimated or self.progress.has_bar:
            return False
        return time.monotonic() - self.progress.marked_at > _SOON

    def check(self) -> list[dict[str, np.ndarray]]:
        """Fetches and checks the metrics that have not been logged yet.

        Raises:
            DivergedError: A metric is NaN or infinite; the message names the first such step, its
                losses and the last good checkpoint.
        """
        pending = jax.device_get(self._pending)
        for step, metrics in pending:
            if not all(np.isfinite(value) for value in metrics.values()):
                shown = ("loss", "norm/gradient")
                terms = [f"{k} {v:.4g}" for k, v in metrics.items() if k.startswith(shown)]
                raise DivergedError(
                    f"step {step} is not finite: {', '.join(terms)}; last good checkpoint: "
                    f"{self._last_good()}; try a lower optimizer.learning_rate or context.weight"
                )
        return [metrics for _, metrics in pending]

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Logs and writes numbers that are not computed in every step."""
        said = [f"{name.removeprefix('eval/')} {value:.4f}" for name, value in values.items()]
        logging.info("step %d  %s", step, ", ".join(said))
        self._write_scalars(step, values)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes an image to the logs."""
        for log in self._logs:
            log.image(step, name, image)

    def text(self, name: str, text: str, step: int = 0) -> None:
        """Writes a text to the logs."""
        for log in self._logs:
            log.text(step, name, text)

    def config(self, config: Mapping[str, Any]) -> None:
        """Writes the config, as plain data, to the logs that keep it as such."""
        for log in self._logs:
            log.config(config)

    def close(self) -> None:
        """Finishes writing the logs, and removes the bar."""
        self._clock.close()
        self.progress.close()
        for log in self._logs:
            log.close()

    def _write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        for log in self._logs:
            log.scalars(step, values)

    def _speed(self, speed: float) -> str:
        """The end of a line: the speed and the time left; empty before the speed is known."""
        if not speed:
            return ""
        images, left = speed * self._spec.batch_size, self.progress.left(speed)
        return f"  {speed:.2f} steps/s  {images:.0f} images/s  {left} left"

    def _write(self, step: int) -> None:
        """Logs the means of the pending metrics as a line and as events."""
        pending = self.check()
        self._pending.clear()
        means = {k: float(np.mean([metrics[k] for metrics in pending])) for k in pending[0]}
        speed = self.progress.mark(step)
        means["speed/steps_per_second"] = speed
        means["speed/images_per_second"] = speed * self._spec.batch_size
        if speed:  # the time of the first step, which compiles, does not count
            means |= self._clock.interval(self.progress.seconds)
            if self._peak_share is not None:
                means["speed/mfu"] = self._peak_share * speed
        self._write_scalars(step, means)
        self._estimated = True
        self._said = f"loss {means['loss']:.4f}"
        if not self.progress.has_bar:
            logging.info(
                "step %d/%d  %s%s", step, self._spec.steps, _losses(means), self._speed(speed)
            )
        waiting = means.get("speed/data_wait", 0.0)
        if waiting > WAITING:
            logging.warning(
                "steps waited for data %.0f %% of the time: raise config.data.threads or workers, "
                "or encode latents ahead of time",
                100 * waiting,
            )


def _losses(means: dict[str, float]) -> str:
    """The loss as the sum of its terms, then the losses of what is trained beside it."""
    terms = {name[5:]: value for name, value in means.items() if name.startswith("loss/")}
    beside = {name: value for name, value in means.items() if name.endswith("_loss")}
    said = f"loss {means['loss']:.4f} = " + " + ".join(f"{k} {v:.4f}" for k, v in terms.items())
    return said + "".join(f", {k.removesuffix('_loss')} {v:.4f}" for k, v in beside.items())
