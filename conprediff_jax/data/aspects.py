"""Batches of several shapes, so that images which are not square lose little to cropping.

    S = {(a, b), (b, a): a = k s >= sqrt(A), b = s round(A / (a s)), a / b <= m}            (1)
    b(H, W) = argmin over (h, w) in S of |log(h / w) - log(H / W)|                          (2)

with A the area and s the step. An image of H x W pixels is cropped and resized to the shape (2) of
S, and every batch holds images of one shape (Podell et al. 2023, SDXL, arXiv 2307.01952, section
2.3). A network without tables of positions takes all of them, by one program for each.

Batches come from the stream of examples in its order: an example waits until its shape has enough
of them for a batch. Of P processes, each reads every P-th example, and they tell each other the
shapes of what they have read. So all of them know which examples wait and which ones make up the
next batch, and these batches of all processes together are those that one process would make. A
process decodes an example of another one again if that one has more of the batch than its part.

The state of the iterator names the places of the examples that wait and their shapes. They are read
again when it is restored.
"""

import collections
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np
from jaxtyping import Int32

Exchange = Callable[[Int32[np.ndarray, "..."]], Int32[np.ndarray, "parts ..."]]
Size = tuple[int, int]
_BASE = 2**31  # places may be larger than what JAX's integers hold
_BAD = -1  # the kind of what cannot be decoded
_THREADS = 8  # that read examples again


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


def key_of(example: Mapping[str, Any]) -> str:
    """The key of what has the shape, in an example or a batch: the image, or else the latent."""
    return "image" if "image" in example else "latent"


def placed(place: int, example: Any) -> tuple[int, Any]:
    """An example with its place in the stream."""
    return place, example


def dealt(places: Iterable[int], parts: int) -> list[list[int]]:
    """The places of a batch by the part that delivers them, as many to each.

    Args:
        places: Places in the stream, as many as fill all parts.
        parts: Number of parts; part p has read the places p, p + parts, ...
    """
    places = list(places)
    each, surplus = len(places) // parts, []
    shares: list[list[int]] = [[] for _ in range(parts)]
    for place in places:
        owner = shares[place % parts]
        (owner if len(owner) < each else surplus).append(place)
    for share in shares:
        lacking = each - len(share)
        share += surplus[:lacking]
        del surplus[:lacking]
    return shares


class ByShape(grain.DatasetIterator):
    """An iterator over batches, each of images (or latents) of one shape.

    Args:
        examples: An iterator over the examples of this part with their places in it, see `placed`.
        stream: The examples of all parts, by place.
        good: Counts an example, and returns whether it is one; see `transforms.BadRecords`.
        batch_size: Number of examples in this part of a batch.
        share: The index of this part, and the number of parts.
        exchange: Returns the arrays that all parts have called it with; None for a single part.
    """

    def __init__(
        self,
        examples: grain.DatasetIterator,
        stream: grain.MapDataset,
        good: Callable[[Any], bool],
        batch_size: int,
        share: tuple[int, int] = (0, 1),
        exchange: Exchange | None = None,
    ):
        super().__init__(examples)
        self._examples, self._stream, self._good = examples, stream, good
        self._batch_size, (self._index, self._parts) = batch_size, share
        self._exchange = exchange or (lambda own: own[None])
        self._at_once = batch_size if self._parts > 1 else 1  # examples between two exchanges
        self._forget()

    def _forget(self) -> None:
        self._held: dict[int, dict[str, Any]] = {}  # examples of this part, by place
        self._waiting: dict[int, list[int]] = {}  # places of all parts, by kind
        self._ready: collections.deque[tuple[int, list[int]]] = collections.deque()

    def __next__(self) -> dict[str, np.ndarray]:
        while not self._ready:
            self._read()
        _, places = self._ready.popleft()
        held = {place: self._held.pop(place, None) for place in places}
        mine = dealt(places, self._parts)[self._index]
        held |= self._read_again([place for place in mine if held[place] is None])
        batch = [held[place] for place in mine]
        return {key: np.stack([example[key] for example in batch]) for key in batch[0]}

    def _read(self) -> None:
        """Reads examples, and adds those of all parts to what waits."""
        own = np.zeros((self._at_once, 3), np.int32)
        for row in own:
            number, example = next(self._examples)
            place = self._index + self._parts * number
            kind = _kind(example) if self._good(example) else _BAD
            if kind != _BAD:
                self._held[place] = example
            row[:] = *divmod(place, _BASE), kind
        every = self._exchange(own).reshape(-1, 3).tolist()
        for high, low, kind in sorted(every):
            if kind != _BAD:
                self._add(high * _BASE + low, kind)

    def _add(self, place: int, kind: int) -> None:
        """Adds a place to those of its kind; enough of them are a batch."""
        alike = self._waiting.setdefault(kind, [])
        alike.append(place)
        if len(alike) == self._batch_size * self._parts:
            self._ready.append((kind, alike))
            del self._waiting[kind]

    def _read_again(self, places: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Examples by their places, whichever part has read them first."""
        if not places:
            return {}
        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(zip(places, pool.map(self._stream.__getitem__, places), strict=True))

    def get_state(self) -> dict[str, Any]:
        """The state of this part's examples, and the places and kinds of those that wait."""
        groups = [*self._ready, *self._waiting.items()]
        return self._examples.get_state() | {
            "waiting": [place for _, alike in groups for place in alike],
            "kinds": [kind for kind, alike in groups for _ in alike],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to the place of a state."""
        state = dict(state)
        waiting = state.pop("waiting", ())  # which a run with one shape does not have
        kinds = state.pop("kinds", None)
        self._examples.set_state(state)
        self._forget()
        if kinds is None:  # an earlier version wrote the state, of a single part
            self._held = self._read_again(waiting)
            kinds = [_kind(self._held[place]) for place in waiting]
        for place, kind in zip(waiting, kinds, strict=True):
            self._add(place, kind)
        own = {place for place in waiting if place % self._parts == self._index}
        self._held |= self._read_again(sorted(own.difference(self._held)))


def _kind(example: dict[str, Any]) -> int:
    """The shape of an example's image or latent, as a number that is the same in all processes."""
    height, width = example[key_of(example)].shape[:2]
    return height << 15 | width
