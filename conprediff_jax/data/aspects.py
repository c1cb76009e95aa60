"""Batches of several shapes, so that images which are not square lose little to cropping.

    S = {(a, b), (b, a): a = k s >= sqrt(A), b = s round(A / (a s)), a / b <= m}            (1)
    b(H, W) = argmin over (h, w) in S of |log(h / w) - log(H / W)|                          (2)

with A the area and s the step. An image of H x W pixels is cropped and resized to the shape (2) of
S, and every batch holds images of one shape (Podell et al. 2023, SDXL, arXiv 2307.01952, section
2.3). A network without tables of positions takes all of them, by one program for each.

Batches come from the stream of examples in its order: an example waits until its shape has enough
of them for a batch. The state of the iterator names the places of those that wait, and they are
read again when it is restored.
"""

import math
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

Size = tuple[int, int]


def shapes_of(size: Size, step: int, most: float) -> tuple[Size, ...]:
    """The shapes (1), from low and wide to high and narrow.

    Args:
        size: Height and width whose product is A. It is one of the shapes.
        step: s, of which all other sides are multiples, in pixels; 0 for `size` alone.
        most: m, at least 1.
    """
    if not step:
        return (size,)
    area, found = math.prod(size), {size}
    for long in range(step, math.ceil(math.sqrt(area * most)) + step, step):
        short = max(round(area / long / step), 1) * step
        if short <= long <= most * short:
            found |= {(long, short), (short, long)}
    return tuple(sorted(found, key=_ratio))


def nearest(shapes: Sequence[Size], size: Size) -> Size:
    """The shape (2) of an image."""
    return min(shapes, key=lambda shape: abs(math.log(_ratio(shape) / _ratio(size))))


def _ratio(size: Size) -> float:
    return size[0] / size[1]


def placed(place: int, example: Any) -> tuple[int, Any]:
    """An example with its place in the stream."""
    return place, example


class ByShape(grain.DatasetIterator):
    """An iterator over batches, each of images of one shape.

    Args:
        examples: An iterator over examples with their places, see `placed`.
        stream: The examples with their places, by place.
        batch_size: Number of examples in a batch.
    """

    def __init__(self, examples: grain.DatasetIterator, stream: grain.MapDataset, batch_size: int):
        super().__init__(examples)
        self._examples, self._stream, self._batch_size = examples, stream, batch_size
        self._waiting: dict[tuple[int, ...], list[tuple[int, dict[str, Any]]]] = {}

    def __next__(self) -> dict[str, np.ndarray]:
        while True:
            alike = self._add(next(self._examples))
            if len(alike) == self._batch_size:
                batch = [example for _, example in alike]
                alike.clear()
                return {key: np.stack([example[key] for example in batch]) for key in batch[0]}

    def _add(self, found: tuple[int, dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
        """Adds an example to those of its shape, and returns them."""
        alike = self._waiting.setdefault(found[1]["image"].shape, [])
        alike.append(found)
        return alike

    def get_state(self) -> dict[str, Any]:
        """The state of the examples, and the places of those that wait for a batch."""
        waiting = [place for alike in self._waiting.values() for place, _ in alike]
        return self._examples.get_state() | {"waiting": waiting}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to the place of a state."""
        state = dict(state)
        waiting = state.pop("waiting", ())  # which a run with one shape does not have
        self._examples.set_state(state)
        self._waiting = {}
        for place in waiting:
            self._add(self._stream[place])
