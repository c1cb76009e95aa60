"""The batches of a run: one process's part of each, and how other processes continue them.

`data.make_iterator` divides the stream of examples into P parts: place i goes to part i mod P. A
checkpoint stores how far each part has come, and so which places have been seen. A run with any
other number of parts begins at the first place that has not been seen. If all parts have come
equally far, every example is seen exactly once. Undecodable images let some parts run ahead by a
few examples, which are then seen again.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

import grain
from etils import epath


class Batches:
    """An iterator of one process's part of every batch, as dicts of NumPy arrays.

    Args:
        iterator: The iterator of this part.
        share: The index of this part, and the number of parts.
    """

    def __init__(self, iterator: grain.DatasetIterator, share: tuple[int, int]):
        self._iterator, self._share = iterator, list(share)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, Any]:
        return next(self._iterator)

    def get_state(self) -> bytes:
        """The place of this part in the data, in the form that grain's checkpoint handler needs."""
        return json.dumps({"share": self._share, "stream": self._iterator.get_state()}).encode()

    def restore(self, folder: epath.Path) -> None:
        """Continues where the parts stopped whose states a folder holds, however many they were.

        Args:
            folder: Folder with the files of grain's checkpoint handler, one per process.

        Raises:
            ValueError: Files are missing, or have another form.
        """
        states = _read_states(folder)
        fresh = self._iterator.get_state()
        mine = [s["stream"] for s in states if s["share"] == self._share]
        if mine and _layout(mine[0]) == _layout(fresh):
            self._iterator.set_state(mine[0])
        else:
            self._iterator.set_state(starting_at(first_unseen(states), fresh, self._share))
        self._iterator.start_prefetch()


def first_unseen(states: Iterable[dict[str, Any]]) -> int:
    """The first place of the whole stream that has not been seen.

    Args:
        states: For every part, `{"share": (index, count), "stream": state of the grain iterator}`.
    """
    places = []
    for state in states:
        index, count = state["share"]
        cursors = _cursors(state["stream"])
        for worker, cursor in enumerate(cursors):
            # Worker w of W reads every W-th example of its part, from the w-th on.
            places.append(index + count * (worker + len(cursors) * cursor["next_index"]))
        # Examples of all parts that were read and wait for a batch; see `data.aspects`.
        places += state["stream"].get("waiting", ())
    return min(places)


def starting_at(first: int, state: dict[str, Any], share: Iterable[int]) -> dict[str, Any]:
    """The state of a part that begins at its first place from `first` on.

    Args:
        first: A place of the whole stream.
        state: State of a fresh iterator of the part.
        share: The index of the part, and the number of parts.
    """
    state = json.loads(json.dumps(state))
    index, count = share
    cursors, places = _cursors(state), []
    for worker, cursor in enumerate(cursors):
        begin, stride = index + count * worker, count * len(cursors)
        cursor["next_index"] = max(0, -((begin - first) // stride))
        places.append(begin + stride * cursor["next_index"])
    if "next_index_in_cycle" in state:
        state["next_index_in_cycle"] = places.index(min(places))
    return state


def _cursors(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The places of the workers of a part; without workers, the place of the part itself."""
    return state.get("iterators_in_use_states", [state])


def _layout(state: dict[str, Any]) -> tuple[bool, int]:
    """Whether workers read a part, and how many; this may change when a run continues."""
    return "iterators_in_use_states" in state, len(_cursors(state))


def _read_states(folder: epath.Path) -> list[dict[str, Any]]:
    states, counts = [], set()
    for file in folder.glob("process_*-of-*.json"):
        index, count = map(int, re.findall(r"\d+", file.name))
        state = json.loads(file.read_text())
        # Files of older versions hold no shares: there was one part per process.
        states.append(state if "share" in state else {"share": [index, count], "stream": state})
        counts.add(count)
    if counts != {len(states)}:
        raise ValueError(f"{folder} holds the states of {len(states)} data iterators of {counts}")
    return states
