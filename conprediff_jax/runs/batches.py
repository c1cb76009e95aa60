"""The batches of a run: this process's part of each, and how another set of processes goes on.

The parts are those of `data.make_iterator`: place i of the stream goes to part i mod P. How far a
part has come, in all of them, says which places have been seen, so that a checkpoint of P parts can
be continued with any other number: all begin at the first place that is still unseen. Nothing is
seen twice, and nothing left out, as long as the parts have come equally far; undecodable images let
some run ahead, by a few examples, which are then seen again.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

import grain
from etils import epath


class Batches:
    """This process's part of every batch; an iterator of dicts of numpy arrays.

    Args:
        iterator: Of the part.
        share: Which part it is, and of how many.
    """

    def __init__(self, iterator: grain.DatasetIterator, share: tuple[int, int]):
        self._iterator, self._share = iterator, list(share)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, Any]:
        return next(self._iterator)

    def get_state(self) -> bytes:
        """Where the part is, as grain's checkpoint handler wants it."""
        return json.dumps({"share": self._share, "stream": self._iterator.get_state()}).encode()

    def restore(self, folder: epath.Path) -> None:
        """Goes on where the parts stopped whose states are in a folder, however many they were.

        Args:
            folder: With the files of grain's checkpoint handler, one a process.

        Raises:
            ValueError: The files are not all there, or not such files.
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
        states: `{"share": (index, count), "stream": a grain iterator's state}` of every part.
    """
    places = []
    for state in states:
        index, count = state["share"]
        cursors = _cursors(state["stream"])
        for worker, cursor in enumerate(cursors):
            # Worker w of W reads every W-th of its part.
            places.append(index + count * (worker + len(cursors) * cursor["next_index"]))
    return min(places)


def starting_at(first: int, state: dict[str, Any], share: Iterable[int]) -> dict[str, Any]:
    """A part's state, changed to begin at its first place that is not before `first`.

    Args:
        first: A place of the whole stream.
        state: Of a fresh iterator of the part.
        share: Which part it is, and of how many.
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
    """Where the workers of a part are; a part without workers is its own."""
    return state.get("iterators_in_use_states", [state])


def _layout(state: dict[str, Any]) -> tuple[bool, int]:
    """Whether a part is read by workers, and by how many; it may differ from run to run."""
    return "iterators_in_use_states" in state, len(_cursors(state))


def _read_states(folder: epath.Path) -> list[dict[str, Any]]:
    states, counts = [], set()
    for file in folder.glob("process_*-of-*.json"):
        index, count = map(int, re.findall(r"\d+", file.name))
        state = json.loads(file.read_text())
        # Files of before shares were written down: a part a process.
        states.append(state if "share" in state else {"share": [index, count], "stream": state})
        counts.add(count)
    if counts != {len(states)}:
        raise ValueError(f"{folder} holds the states of {len(states)} data iterators of {counts}")
    return states
