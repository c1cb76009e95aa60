"""Speed and time left of long work, and the line that says so."""

import contextlib
import time
from collections.abc import Iterator

from absl import logging


class Progress:
    """Counts units of work against the clock.

    Args:
        total: Units of the whole work.
        done: Units done before this program started; they do not count for the speed.

    Attributes:
        seconds: Seconds between the last two marks, without pauses.
    """

    def __init__(self, total: int, done: int = 0):
        self.total, self.done = total, done
        self.seconds = 0.0
        self._marked, self._marked_at = done, time.monotonic()

    def mark(self, done: int) -> float:
        """Notes how much is done, and returns the speed since the last mark in units a second."""
        now = time.monotonic()
        self.seconds = max(now - self._marked_at, 1e-9)
        speed = (done - self._marked) / self.seconds
        self.done, self._marked, self._marked_at = done, done, now
        return speed

    def left(self, speed: float) -> str:
        """Returns the time left at a speed in units a second, as `h:mm:ss` or `m:ss`."""
        seconds = round((self.total - self.done) / speed) if speed > 0 else 0
        hours, rest = divmod(seconds, 3600)
        minutes, seconds = divmod(rest, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Encloses work of another kind, whose time does not count."""
        began = time.monotonic()
        yield
        self._marked_at += time.monotonic() - began


class ProgressLine:
    """Logs how far long work is, at most once in some seconds, and when all of it is done.

        runs/faces: 512/2048 images  31.2 images/s  0:49 left

    Args:
        total: Units of the whole work.
        unit: Name of the units, in the plural.
        done: Units done before this program started; they do not count for the speed.
        about: What the work is about, which precedes the numbers; may be empty.
        every: Seconds between two lines, at least.
    """

    def __init__(
        self, total: int, unit: str, *, done: int = 0, about: str = "", every: float = 10.0
    ):
        self._progress, self._unit, self._about = Progress(total, done), unit, about
        self._done, self._every, self._logged_at = done, every, time.monotonic()

    def add(self, count: int) -> None:
        """Counts units that were done since the last call, and logs a line when it is due."""
        self._done += count
        now, total = time.monotonic(), self._progress.total
        if now - self._logged_at < self._every and self._done < total:
            return
        self._logged_at, speed = now, self._progress.mark(self._done)
        logging.info(
            "%s%d/%d %s  %.*f %s/s  %s left",
            f"{self._about}: " if self._about else "",
            self._done,
            total,
            self._unit,
            1 if speed >= 10 else 2,
            speed,
            self._unit,
            self._progress.left(speed),
        )
