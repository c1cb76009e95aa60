"""Batches whose images threads decode straight into the memory of the batch.

    places n, n + 1, ... of the stream -> tasks of a few places -> slots of the arrays of batches

A batch is as if examples were made one by one, those that cannot be decoded were left out, and the
others were stacked. But a decoder that writes into its slot saves two copies of every image, and
tasks of several places save most of what threads cost. Only when an example was left out, the
images behind it have to be copied to their new slots.
"""

import collections
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from conprediff_jax.data import sources, transforms

_MOST = 16  # places of a task, at most


def drawn(record: int, rng: np.random.Generator) -> tuple[int, list[float]]:
    """The number of a record, and the numbers that are drawn for a place of the stream."""
    return record, rng.random(transforms.DRAWS).tolist()


def undrawn(record: int) -> tuple[int, list[float]]:
    """As `drawn`, for examples that do not depend on what is drawn."""
    return record, [0.0] * transforms.DRAWS


class Batched(grain.DatasetIterator):
    """An iterator over batches, which are dicts of arrays.

    Args:
        source: The records.
        places: The number of a record and drawn numbers, by place; see `drawn`.
        example: Makes an example of a record and drawn numbers.
        good: Counts an example, and returns whether it is one; see `transforms.BadRecords`.
        batch_size: Number of examples in a batch.
        image: Shape of an image; None for examples without images.
        threads: Number of threads; 0 for the caller's.
        ahead: Number of examples that are made ahead of the one that is delivered next.
    """

    def __init__(
        self,
        source: sources.Source,
        places: grain.MapDataset,
        example: transforms.ToExample,
        good: Callable[[Any], bool],
        *,
        batch_size: int,
        image: tuple[int, int, int] | None,
        threads: int,
        ahead: int,
    ):
        super().__init__()
        self._source, self._places, self._example, self._good = source, places, example, good
        self._batch_size, self._image = batch_size, image
        self._ahead = ahead if threads else 0
        self._at_once = min(max(1, ahead // max(threads, 1)), _MOST, batch_size)
        self._pool = ThreadPoolExecutor(threads) if threads else None
        self._tasks: collections.deque[Future] = collections.deque()
        self._made: collections.deque[Any] = collections.deque()
        self._go_to(0)

    def _go_to(self, place: int) -> None:
        """Makes a place the next one."""
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()
        self._made.clear()
        self._next = self._begun = place
        self._slots: Sequence[np.ndarray | None] = ()
        self._arrays: collections.deque[tuple[int, np.ndarray]] = collections.deque()

    def __next__(self) -> dict[str, np.ndarray]:
        self._assert_not_closed()
        began, batch = self._next, []
        while len(batch) < self._batch_size:
            if not self._made:
                self._made.extend(self._take())
            example = self._made.popleft()
            self._next += 1
            if self._good(example):
                batch.append(example)
        whole = self._filled(began)
        made = {} if whole is None else {"image": whole}
        for key in batch[0].keys() - made.keys():
            made[key] = np.stack([example[key] for example in batch])
        return made

    def _filled(self, began: int) -> np.ndarray | None:
        """The array that the examples from a place on to the next one fill, if there is one."""
        whole = None
        while self._arrays and self._arrays[0][0] + self._batch_size <= self._next:
            start, array = self._arrays.popleft()
            whole = array if (start, start + self._batch_size) == (began, self._next) else None
        return whole

    def _take(self) -> list[Any]:
        """The examples of the next task."""
        self.start_prefetch()
        if self._pool is None:
            return self._make(*self._planned())
        if not self._tasks:
            raise StopIteration
        made = self._tasks.popleft().result()
        self.start_prefetch()
        return made

    def start_prefetch(self) -> None:
        """Begins tasks until enough examples are made ahead."""
        while self._begun < min(self._next + self._ahead, len(self._places)):
            self._tasks.append(self._pool.submit(self._make, *self._planned()))

    def _planned(self) -> tuple[range, Sequence[np.ndarray | None]]:
        """The places of a further task, and the slots for their images.

        Raises:
            StopIteration: There are no further places.
        """
        if not self._slots:
            if self._image is None:
                self._slots = [None] * self._batch_size
            else:
                array = np.empty((self._batch_size, *self._image), np.uint8)
                self._arrays.append((self._begun, array))
                self._slots = list(array)
        count = min(self._at_once, len(self._slots), len(self._places) - self._begun)
        if not count:
            raise StopIteration
        slots, self._slots = self._slots[:count], self._slots[count:]
        places = range(self._begun, self._begun + count)
        self._begun += count
        return places, slots

    def _make(self, places: range, slots: Sequence[np.ndarray | None]) -> list[Any]:
        """The examples of some places.

        Each kind of work is done for all of them, as decoding leaves nothing else in the caches.
        """
        told = [self._places[place] for place in places]
        records = [self._source[record] for record, _ in told]
        numbers = [drawn for _, drawn in told]
        return list(map(self._example.drawn, records, numbers, slots))

    def get_state(self) -> dict[str, Any]:
        """The next place, as grain's iterators give it."""
        return {"next_index": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to the place of a state."""
        self._go_to(state["next_index"])

    def close(self) -> None:
        """Ends the threads."""
        super().close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
