"""Counts what an import sees: in each part, in all parts together, and as lines of a report."""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from absl import logging

from conprediff_jax.common.errors import printable
from conprediff_jax.data.importing.inspecting import Seen

_MOST_NAMES = 5  # of the records that a report names for each reason


@dataclasses.dataclass
class Tally:
    """Counts of reasons, with the names of the first few records of each.

    Attributes:
        counts: How many records there were, by reason.
        names: Names of some of them, with details.
    """

    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    names: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, reason: str, name: str, detail: str = "") -> bool:
        """Counts a record; returns whether the record is the first one of its reason."""
        self.counts[reason] += 1
        names = self.names.setdefault(reason, [])
        if len(names) < _MOST_NAMES:
            names.append(printable(name) + (f" ({detail})" if detail and detail != reason else ""))
        return self.counts[reason] == 1

    def include(self, other: "Tally") -> None:
        """Adds the counts of another tally."""
        self.counts.update(other.counts)
        for reason, names in other.names.items():
            mine = self.names.setdefault(reason, [])
            mine += names[: _MOST_NAMES - len(mine)]

    def to_json(self) -> list[dict[str, Any]]:
        """The reasons by their counts, the most frequent one first."""
        return [
            {"reason": reason, "count": count, "such_as": self.names[reason]}
            for reason, count in self.counts.most_common()
        ]

    @classmethod
    def from_json(cls, stored: list[dict[str, Any]]) -> "Tally":
        """The tally that `to_json` describes."""
        counts = collections.Counter({entry["reason"]: entry["count"] for entry in stored})
        return cls(counts, {entry["reason"]: list(entry["such_as"]) for entry in stored})


class Counts:
    """What was seen in a part."""

    def __init__(self):
        self.left_out, self.notes = Tally(), Tally()
        self.forms, self.sides = collections.Counter(), collections.Counter()
        self.lengths, self.labels = collections.Counter(), collections.Counter()
        self.digests: dict[str, list[tuple[str, str]]] = {}

    def add(self, record: dict[str, Any], seen: Seen) -> None:
        """Counts what is odd about a record; the first one of each kind is named in the log."""
        name = record["name"]
        if seen.left_out and self.left_out.add(seen.left_out, name, seen.detail):
            logging.warning("left out %s: %s", printable(name), seen.detail or seen.left_out)
        for note in () if seen.left_out else seen.notes:
            self.notes.add(note, name)

    def kept(self, split: str, record: dict[str, Any], seen: Seen) -> None:
        """Counts a record that is imported."""
        self.forms[seen.form] += 1
        self.sides[_rounded(min(seen.size))] += 1
        self.digests.setdefault(split, []).append((seen.digest.hex(), printable(record["name"])))
        if "label" in record:
            self.labels[str(record["label"])] += 1
        if "text" in record:
            words = [len(text.split()) for text in record["text"]]
            self.lengths.update(map(str, words or ["none"]))

    def to_json(self) -> dict[str, Any]:
        """The counts in types of JSON."""
        return {
            "left_out": self.left_out.to_json(),
            "notes": self.notes.to_json(),
            "formats": dict(self.forms),
            "shorter_sides": dict(self.sides),
            "labels": dict(self.labels),
            "caption_words": dict(self.lengths),
            "digests": self.digests,
        }


def _rounded(side: int) -> str:
    """A range of sides by powers of two, such as '256 to 511'."""
    low = 1 << (side.bit_length() - 1)
    return f"{low} to {2 * low - 1}"


def merged(counts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The counts of all parts together."""
    total = {}
    for key in ("left_out", "notes"):
        tally = Tally()
        for part in counts:
            tally.include(Tally.from_json(part[key]))
        total[key] = tally.to_json()
    for key in ("formats", "shorter_sides", "labels", "caption_words"):
        counted = sum((collections.Counter(part[key]) for part in counts), collections.Counter())
        total[key] = dict(counted.most_common())
    return total


def duplicates(counts: Sequence[dict[str, Any]]) -> tuple[dict[tuple[int, str], set[int]], Tally]:
    """The records whose image came before, by part and split, and their tally."""
    first: dict[str, str] = {}
    again, tally = {}, Tally()
    for number, part in enumerate(counts):
        for split, digests in part["digests"].items():
            for place, (digest, name) in enumerate(digests):
                if digest in first:
                    again.setdefault((number, split), set()).add(place)
                    tally.add("the same bytes as an image before", name, first[digest])
                first.setdefault(digest, name)
    return again, tally


def lines(report: dict[str, Any]) -> list[str]:
    """A report as lines of text.

    Args:
        report: The content of `report.json`.
    """
    splits = ", ".join(f"{count:,} {split}" for split, count in report["splits"].items())
    said = [f"imported from {report['source']}: {splits}"]
    for key, title in {
        "formats": "formats", "shorter_sides": "shorter sides in pixels",
        "caption_words": "words of captions",
    }.items():  # fmt: skip
        if report[key]:
            counts = sorted(report[key].items(), key=functools.partial(_order, key))
            said.append(f"{title}: " + ", ".join(f"{name} ({count:,})" for name, count in counts))
    if names := report["class_names"]:
        counts = [f"{name} ({report['labels'].get(str(i), 0):,})" for i, name in enumerate(names)]
        said.append(f"{len(names)} classes: " + ", ".join(counts))
    again = "left out" if report["drop_duplicates"] else "kept"
    for key, verb in {"left_out": "left out", "duplicates": again, "notes": "kept"}.items():
        said += [
            f"{verb} {entry['count']:,}: {entry['reason']}, such as {', '.join(entry['such_as'])}"
            for entry in report[key]
        ]
    return said + report["said"]


def _order(key: str, item: tuple[str, int]) -> Any:
    """Sorts formats by their counts, and ranges of numbers by size."""
    name, count = item
    if key == "formats":
        return -count
    digits = name.split()[0]
    return int(digits) if digits.isdecimal() else -1
