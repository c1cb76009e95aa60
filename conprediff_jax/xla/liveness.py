"""Which intermediate values of a program are in memory at once, by its schedule.

The text of a compiled module lists instructions in the order in which they run. A value lives from
the instruction that makes it to the last instruction that reads it or a view of it. The results of
a program take the places of its donated arguments. A loop needs the memory of its body in addition
to the values that it carries. Only HBM counts. The compiler places all values in one block and
loses some of it to gaps, so that it reports a little more than the sum here.
"""

import dataclasses
import re

from conprediff_jax.xla.hlo import Computation, Instruction, Module

_FORWARD = re.compile(r"jvp\(")
_BACKWARD = re.compile(r"transpose\(")
_OP_NAME = r'op_name="([^"]*)"'
_VIEWS = {"bitcast", "tuple", "get-tuple-element", "while", "opt-barrier", "dynamic-update-slice"}
_STARTS = {"slice-start", "all-gather-start", "collective-permute-start"}
_DONES = {"slice-done", "all-gather-done", "collective-permute-done"}
_INSIDE = ("while", "call", "conditional")


@dataclasses.dataclass(frozen=True)
class Peak:
    """The moment at which most bytes are in use.

    Attributes:
        total: Bytes of all values that live at that moment.
        activations: Bytes of those among them that belong to the forward pass of a gradient.
    """

    total: int = 0
    activations: int = 0

    def __add__(self, other: "Peak") -> "Peak":
        return Peak(self.total + other.total, self.activations + other.activations)


def is_activation(op_name: str) -> bool:
    """Whether a value is of the forward pass: JAX names it `jvp`, the backward pass `transpose`."""
    return bool(_FORWARD.search(op_name)) and not _BACKWARD.search(op_name)


def peak(module: Module, computation: Computation | None = None) -> Peak:
    """The moment at which a program, or one of its computations, uses most memory."""
    computation = computation or module.entry
    instructions = list(computation.instructions.values())
    # For every leaf of a result, the buffer that holds it; None for a buffer of the caller.
    places: dict[str, list[str | None]] = {}
    sizes: dict[str, Peak] = {}
    last: dict[str, int] = {}
    for order, instruction in enumerate(instructions):
        made = _places(instruction, places)
        places[instruction.name] = made
        for place, shape in zip(made, instruction.shapes, strict=False):
            if place and place.startswith(instruction.name + "#"):
                bytes_ = 0 if shape.memory else shape.nbytes
                forward = is_activation(instruction.attribute(_OP_NAME) or "")
                sizes[place] = Peak(bytes_, bytes_ if forward else 0)
        for operand in (instruction.name, *instruction.operands):
            for place in places.get(operand, ()):
                if place:
                    last[place] = order
    for place in places[computation.root.name]:
        sizes.pop(place, None)  # results lie in buffers of arguments, or of values that are carried
    ending: dict[int, list[str]] = {}
    for place, order in last.items():
        ending.setdefault(order, []).append(place)
    most = alive = Peak()
    for order, instruction in enumerate(instructions):
        for place in places[instruction.name]:
            if place and place.startswith(instruction.name + "#") and place in sizes:
                alive = alive + sizes[place]
        inside = Peak()
        if instruction.opcode in _INSIDE:
            within = [peak(module, module.computations[name]) for name in instruction.called]
            inside = max(within, key=lambda p: p.total, default=inside)
        most = max(most, alive + inside, key=lambda p: p.total)
        for place in ending.get(order, ()):
            if place in sizes:
                alive = Peak(
                    alive.total - sizes[place].total, alive.activations - sizes[place].activations
                )
    return most


def _places(instruction: Instruction, places: dict[str, list[str | None]]) -> list[str | None]:
    """The buffers that hold the leaves of a result."""
    opcode, operands = instruction.opcode, instruction.operands
    own: list[str | None] = [f"{instruction.name}#{i}" for i in range(len(instruction.shapes))]
    if opcode in ("parameter", "constant"):
        return [None] * len(own)
    given = [places.get(operand, [None]) for operand in operands]
    if opcode == "get-tuple-element":
        index = int(instruction.attribute(r"index=(\d+)"))
        return given[0][index : index + 1] if len(own) == 1 else own
    if opcode == "tuple" or "ConcatBitcast" in instruction.attributes:
        return [place for leaves in given for place in leaves]
    if opcode in _VIEWS:
        return given[0]
    if opcode == "copy-start":  # the copy, the original, a flag
        return [own[0], given[0][0], *[None] * len(own[2:])]
    if opcode in _STARTS:  # the operand, the result, flags
        return [given[0][0], own[1], *[None] * len(own[2:])]
    if opcode == "copy-done":
        return given[0][:1]
    if opcode in _DONES:
        return given[0][1:2]
    for output, operand in re.findall(r"\{(\d*)\}: \((\d+), \{\}", _aliasing(instruction)):
        own[int(output or 0)] = given[int(operand)][0]
    return own


def _aliasing(instruction: Instruction) -> str:
    """The attribute that says which results overwrite operands."""
    return instruction.attribute(r"output_to_operand_aliasing=\{(.*?\})\}(?:,|$)") or ""
