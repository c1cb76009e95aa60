"""Speed and time left of long work."""

import contextlib
import time
from collections.abc import Iterator


class Progress:
    """Counts units of work against the clock.

    Args:
        total: units of the whole work.
        done: units done before this program started; they do not count for the speed.

    Attributes:
        seconds: between the last two marks, pauses left out.
    """

    def __init__(self, total: int, done: int = 0):
        self.total, self.done = total, done
        self.seconds = 0.0
        self._marked, self._marked_at = done, time.monotonic()

    def mark(self, done: int) -> float:
        """Notes how much is done; returns units a second since the last mark."""
        now = time.monotonic()
        self.seconds = max(now - self._marked_at, 1e-9)
        speed = (done - self._marked) / self.seconds
        self.done, self._marked, self._marked_at = done, done, now
        return speed

    def left(self, speed: float) -> str:
        """Time left at a speed, `h:mm:ss` or `m:ss`."""
        seconds = round((self.total - self.done) / speed) if speed > 0 else 0
        hours, rest = divmod(seconds, 3600)
        minutes, seconds = divmod(rest, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Work of another kind: the time it takes does not count."""
        began = time.monotonic()
        yield
        self._marked_at += time.monotonic() - began
