"""Speed and time left of long work: a bar where the output is a terminal, lines where it is not."""

import contextlib
import time
from collections.abc import Iterator
from numbers import Real

from absl import logging
from tqdm import tqdm

COMPILING = "compiling: usually less than a minute, or minutes for a large model"

_SOON = 2.0  # seconds from compiling to the first line that tells the time left

# The speed is always units a second, and a batch that is being worked on counts in part.
_BAR = (
    "{desc}{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f}{unit} "
    "[{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
)


class Progress:
    """Counts units of work against the clock, and draws a bar if stderr is a terminal.

    Args:
        total: Units of the whole work.
        done: Units done before this program started; they do not count for the speed.
        unit: Name of the units, in the plural.
        bar: Whether to draw a bar.

    Attributes:
        done: Units done at the last mark.
        marked_at: Time of the last mark by `time.monotonic`, moved forward by pauses since then.
        seconds: Seconds between the last two marks, without pauses.
    """

    def __init__(self, total: int, done: int = 0, unit: str = "steps", *, bar: bool = True):
        self.total, self.done = total, done
        self.seconds, self.marked_at = 0.0, time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=f" {unit}",
            bar_format=_BAR,
            dynamic_ncols=True,
            leave=False,
            disable=None if bar else True,  # None disables bars outside terminals
        )

    @property
    def has_bar(self) -> bool:
        """Whether there is a bar, in place of lines."""
        return not self._bar.disable

    def draw(self, done: Real, about: str = "", said: str = "") -> None:
        """Moves the bar, if there is one.

        Args:
            done: Units done, of which one may be done in part.
            about: What stands before the bar.
            said: What stands behind it.
        """
        if self.has_bar:
            self._bar.set_description_str(about, refresh=False)
            self._bar.set_postfix_str(said, refresh=False)
            self._bar.update(done - self._bar.n)

    def skip(self, done: int) -> None:
        """Notes that `done` units were done before, which do not count for the speed."""
        self.mark(done)
        self._bar.initial = self._bar.n = self._bar.last_print_n = done
        self.restart()

    def without(self, count: int) -> None:
        """Takes units off the whole work."""
        self.total -= count
        self._bar.total = self.total

    def restart(self) -> None:
        """Lets the time since the bar moved last not count for its speed."""
        if self.has_bar:
            self._bar.unpause()

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()

    def mark(self, done: Real) -> float:
        """Notes how much is done, and returns the speed since the last mark in units a second."""
        now = time.monotonic()
        self.seconds = max(now - self.marked_at, 1e-9)
        speed = (done - self.done) / self.seconds
        self.done, self.marked_at = done, now
        return speed

    def speed(self, done: Real) -> float:
        """Returns the speed since the last mark without a new mark."""
        return (done - self.done) / max(time.monotonic() - self.marked_at, 1e-9)

    def left(self, speed: Real, done: Real | None = None) -> str:
        """Returns the time left at a speed in units a second, after `done` units; see `clock`.

        Args:
            speed: Units a second.
            done: Units done; by default those at the last mark.
        """
        done = self.done if done is None else done
        return clock((self.total - done) / speed if speed > 0 else 0)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Encloses work of another kind, whose time does not count."""
        began = time.monotonic()
        yield
        self.marked_at += time.monotonic() - began
        self.restart()


def clock(seconds: Real) -> str:
    """A length of time as `m:ss`, or as `h:mm:ss` from an hour on."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class ProgressLine:
    """Says how far long work is: by a bar, or by a line at most once in some seconds.

        compiling: usually less than a minute, or minutes for a large model
        compiled in 0:09
        0/64 images, step 7/50 of the next 32  2.1 images/s  0:28 left
        32/64 images, step 20/50 of the next 32  2.0 images/s  0:10 left
        64/64 images in 0:42

    The last line comes in a terminal, too. The time that the first units take for compiling does
    not count for the speed.

    Args:
        total: Units of the whole work.
        unit: Name of the units, in the plural.
        batch: Number of units that are worked on at a time, for `within`.
        about: What the work is about, which precedes the numbers; may be empty.
        every: Seconds between two lines, at least.

    Attributes:
        about: As above; it may change while the work goes on.
        batch: As above; likewise.
    """

    def __init__(
        self, total: int, unit: str, *, batch: int = 1, about: str = "", every: float = 10.0
    ):
        self.about, self.batch = about, batch
        self._progress, self._unit = Progress(total, unit=unit), unit
        self._done, self._every = 0, every
        self._began = self._logged_at = time.monotonic()
        self._compiles = False

    def skip(self, count: int) -> None:
        """Counts units that were there before, which do not count for the speed."""
        self._done += count
        self._progress.skip(self._done)

    def without(self, count: int) -> None:
        """Takes units off the whole work, which other processes do."""
        self._progress.without(count)

    def compiling(self) -> None:
        """Says that the work begins with compiling. The next call of `add` or `within` ends it."""
        if not self._compiles:
            self._compiles, self._logged_at = True, time.monotonic()
            logging.info("%s", COMPILING)

    def within(self, step: int, steps: int) -> None:
        """Notes that `step` of the `steps` of a batch are done; logs a line when it is due."""
        batch = min(self.batch, self._progress.total - self._done)
        if step < steps or self._compiles:  # `add` follows the last step
            place = f", step {step}/{steps} of the next {batch}"
            self._log(self._done + batch * step / steps, place)

    def add(self, count: int) -> None:
        """Counts units that were done since the last call, and logs a line when it is due."""
        self._done += count
        if self._done < self._progress.total:
            self._log(self._done, "")
            return
        self._compiles = False
        self._progress.close()
        took = clock(time.monotonic() - self._began)
        logging.info("%s%d/%d %s in %s", self._head(), self._done, self._done, self._unit, took)

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Encloses work of another kind, whose time does not count for the speed."""
        return self._progress.paused()

    def _log(self, done: Real, place: str) -> None:
        """Logs a line when it is due. Those after compiling come sooner: they tell the time."""
        now = time.monotonic()
        if self._compiles:
            self._compiles = False
            logging.info("compiled in %s", clock(now - self._logged_at))
            self._progress.mark(done)
            self._progress.restart()
            self._logged_at = now - self._every + min(self._every, _SOON)
        if self._progress.has_bar:
            self._progress.draw(done, self._head(), place.removeprefix(", "))
            return
        if now - self._logged_at < self._every or done == self._progress.done:
            return
        self._logged_at, speed = now, self._progress.mark(done)
        logging.info(
            "%s%d/%d %s%s  %.*f %s/s  %s left",
            self._head(),
            self._done,
            self._progress.total,
            self._unit,
            place,
            1 if speed >= 10 else 2,
            speed,
            self._unit,
            self._progress.left(speed),
        )

    def _head(self) -> str:
        return f"{self.about}: " if self.about else ""
