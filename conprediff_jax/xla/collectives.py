"""The collectives of a compiled program: what the devices of a mesh send each other.

For a group of n devices with an operand of S bytes on each, a ring sends from every device

    all-reduce          2 (n - 1) / n S                                                    (1)
    reduce-scatter        (n - 1) / n S                                                    (2)
    all-gather            (n - 1) S       (S is the part that a device holds)              (3)
    all-to-all            (n - 1) / n S                                                    (4)
    collective-permute    S                                                                (5)

The traffic of (1) stays below 2 S for any number of devices; the payload S does not depend on n.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np

from conprediff_jax.xla.hlo import Computation, Instruction, Module

_TRAFFIC = {
    "all-reduce": lambda size, n: 2 * (n - 1) / n * size,
    "reduce-scatter": lambda size, n: (n - 1) / n * size,
    "all-gather": lambda size, n: (n - 1) * size,
    "all-to-all": lambda size, n: (n - 1) / n * size,
    "ragged-all-to-all": lambda size, n: (n - 1) / n * size,
    "collective-broadcast": lambda size, n: size,
    "collective-permute": lambda size, n: size,
}
_PAIRS = re.compile(r"\{(\d+),(\d+)\}")
_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_FORMULA = re.compile(rf"replica_groups=\[([\d,]+)\]<={_IOTA}")
_MESH = re.compile(
    rf"replica_groups=@?mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? ?\{{([^}}]*)\}}"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
        name: Name of the instruction.
        kind: The operation: 'all-reduce', 'all-gather', ...
        axes: The mesh axes along which the devices of a group differ.
        group: Number of devices in a group.
        times: How often it runs.
        payload: S, the bytes of the operands on one device, summed over all runs.
        traffic: Bytes that a device sends by (1) to (5), summed over all runs.
        op_name: JAX's name of the operation that it comes from.
    """

    name: str
    kind: str
    axes: tuple[str, ...]
    group: int
    times: int
    payload: float
    traffic: float
    op_name: str


def collectives(module: Module, mesh_shape: dict[str, int]) -> list[Collective]:
    """All collectives of a program that involve more than one device.

    Args:
        module: A program that was compiled for the mesh.
        mesh_shape: Names and sizes of the mesh's axes, as in `Mesh.shape`.
    """
    found, seen = [], set()
    for visit in module.visits():
        instruction = visit.instruction
        kind = instruction.opcode.removesuffix("-start")
        if kind not in _TRAFFIC:
            continue
        # On TPUs, one collective may be spread over a chain of fusions, and each of them lists it.
        channel = (kind, instruction.attribute(r"channel_id=(\d+)"))
        if channel[1] and channel in seen:
            continue
        seen.add(channel)
        groups = replica_groups(instruction.attributes, math.prod(mesh_shape.values()))
        axes, size = _axes(groups, mesh_shape)
        if size == 1:
            continue
        payload = float(visit.times * _payload(instruction, visit.computation))
        found.append(
            Collective(
                name=instruction.name,
                kind=kind,
                axes=axes,
                group=size,
                times=visit.times,
                payload=payload,
                traffic=_TRAFFIC[kind](payload, size),
                op_name=instruction.attribute(r'op_name="([^"]*)"') or "",
            )
        )
    return found


def by_axis(found: Iterable[Collective]) -> dict[str, dict[str, float]]:
    """Payload, traffic and number of operations for each combination of mesh axes.

    Args:
        found: The collectives.

    Returns:
        For each combination, such as `data` or `data+fsdp`, a dict with the keys `payload`,
        `traffic` and `operations`.
    """
    totals: dict[str, dict[str, float]] = collections.defaultdict(
        lambda: {"payload": 0.0, "traffic": 0.0, "operations": 0.0}
    )
    for collective in found:
        total = totals["+".join(collective.axes)]
        total["payload"] += collective.payload
        total["traffic"] += collective.traffic
        total["operations"] += collective.times
    return dict(sorted(totals.items()))


def replica_groups(attributes: str, devices: int) -> list[tuple[int, ...]]:
    """The groups of devices that a collective connects, from any notation of XLA.

    Args:
        attributes: The attributes of the instruction.
        devices: Number of devices of the program.

    Returns:
        Groups of indices into the flat mesh; for a permutation, the pairs (source, target).

    Raises:
        ValueError: The groups are written in an unknown notation.
    """
    if "source_target_pairs=" in attributes:
        pairs = attributes.split("source_target_pairs=")[1].split("}}")[0] + "}"
        return [(int(a), int(b)) for a, b in _PAIRS.findall(pairs) if a != b]
    if match := _FORMULA.search(attributes):
        return _rows(_iota(match[2], match[3]).reshape(_sizes(match[1])))
    if match := _MESH.search(attributes):
        return _mesh_groups(*match.groups())
    if match := _LISTED.search(attributes):
        listed = [_sizes(group) for group in re.findall(r"\{([\d,]*)\}", match[1])]
        return [group for group in listed if group] or [tuple(range(devices))]
    if "replica_groups=" in attributes:
        raise ValueError(f"replica groups in an unknown form: {attributes[:200]}")
    return [tuple(range(devices))]


def _mesh_groups(
    axes: str, reshape: str | None, order: str | None, grouped: str
) -> list[tuple[int, ...]]:
    """Groups that are written as axes of the compiler's mesh, or as parts `axis:(before)size`."""
    sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", axes)}
    total = math.prod(sizes.values())
    devices = (_iota(reshape, order) if reshape else np.arange(total)).reshape(
        tuple(sizes.values())
    )
    moved = []
    parts = re.findall(r"'?(\w+)'?(?::\((\d+)\)(\d+))?", grouped)
    for name, before, size in parts:
        axis = list(sizes).index(name)
        # A part divides its axis into (before, part, rest); a whole axis is (1, size, 1).
        whole = sizes[name]
        moved.append((axis, int(before or 1), int(size or whole)))
    shape, grouped_axes = [], []
    for axis, whole in enumerate(sizes.values()):
        split = next((m for m in moved if m[0] == axis), None)
        if split is None:
            shape.append(whole)
        else:
            grouped_axes.append(len(shape) + 1)
            shape += [split[1], split[2], whole // (split[1] * split[2])]
    devices = devices.reshape(shape)
    size = math.prod(devices.shape[axis] for axis in grouped_axes)
    last = range(-len(grouped_axes), 0)
    return _rows(np.moveaxis(devices, grouped_axes, last).reshape(-1, size))


def _iota(reshape: str, order: str | None) -> np.ndarray:
    """XLA's `[reshape]T(order)`: 0, 1, 2, ... reshaped, transposed, and flattened again."""
    shape = _sizes(reshape)
    array = np.arange(math.prod(shape)).reshape(shape)
    return array.transpose(_sizes(order)).reshape(-1) if order else array.reshape(-1)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)


def _rows(array: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(int(device) for device in row) for row in array]


def _axes(groups: list[tuple[int, ...]], mesh_shape: dict[str, int]) -> tuple[tuple[str, ...], int]:
    """The mesh axes along which the devices of a group differ, and the size of a group."""
    if not groups:
        return (), 1
    varying = set()
    for group in groups:
        places = np.unravel_index(group, tuple(mesh_shape.values()))
        varying |= {name for name, p in zip(mesh_shape, places, strict=True) if np.ptp(p)}
    axes = tuple(name for name in mesh_shape if name in varying)
    return axes, len(groups[0])


def _payload(instruction: Instruction, computation: Computation) -> int:
    """S, the bytes of the operands without padding."""
    shapes = (computation[name].shapes for name in instruction.operands)
    return sum(shape.payload for operand in shapes for shape in operand)
