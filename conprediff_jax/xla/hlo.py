"""A parser for the text of compiled programs, `jax.stages.Compiled.as_text()`.

XLA prints a module as computations, and a computation as one instruction a line,

    %fusion.7 = bf16[8,64]{1,0:T(8,128)(2,1)} fusion(%a, %b), kind=kLoop, calls=%computation.3

The shape comes first: the element type, the dimensions, and the layout in braces. On a TPU, the
layout names the tiles that the array is padded to, and the memory that holds it (S(1) is on-core
memory; no mark is HBM). The parser reads what the modules of this folder need, and runs nothing.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BYTES = {
    "pred": 1.0,
    "s4": 0.5,
    "u4": 0.5,
    "bf16": 2.0,
    "c64": 8.0,
    "c128": 16.0,
    "token": 0.0,
    "opaque": 0.0,
}
_COMMENT = re.compile(r"/\*.*?\*/")
_SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_LINE = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" *([\w\-]+)\(")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_TRIP_COUNT = re.compile(r'"?known_trip_count"?:\{"?n"?:"?(\d+)')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_DIRECTION = re.compile(r"direction=(\w+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of one array.

    Attributes:
        dtype: XLA's name of the element type.
        dims: The dimensions.
        padded: Number of elements that are stored, with the padding to the tiles of the layout.
        memory: Number of the memory that holds the array; 0 is HBM.
    """

    dtype: str
    dims: tuple[int, ...]
    padded: int
    memory: int

    @property
    def elements(self) -> int:
        """Number of elements, without padding."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """Bytes of the array as it is stored, with padding."""
        return math.ceil(self.padded * _element_bytes(self.dtype))

    @property
    def payload(self) -> int:
        """Bytes of the elements, without padding."""
        return math.ceil(self.elements * _element_bytes(self.dtype))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: Name, unique in the computation.
        opcode: Name of the operation.
        shapes: Shape of the result; several shapes for a tuple.
        operands: Names of the instructions that it reads. For a constant its value, and for a
            parameter its number.
        attributes: The rest of the line.
        root: Whether it is the result of the computation.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs, without the condition of a loop."""
        names = []
        for single, several in _CALLED.findall(self.attributes):
            names += [single] if single else _NAME.findall(several)
        return tuple(names)

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes; None where nothing matches."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named list of instructions."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The instruction whose value is the result."""
        return next(i for i in self.instructions.values() if i.root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The parameters by their numbers."""
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {int(i.operands[0]): i for i in found}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read an instruction, by its name."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction)
        return users

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]


@dataclasses.dataclass(frozen=True)
class Visit:
    """An instruction as the program runs it.

    Attributes:
        instruction: The instruction.
        computation: The computation that contains it.
        times: How often it runs.
        fused: Whether it is part of a fusion, whose intermediate values never reach memory.
    """

    instruction: Instruction
    computation: Computation
    times: int
    fused: bool


class Module:
    """A compiled program.

    Args:
        text: The text of the compiled module.

    Attributes:
        computations: All computations by name.
        entry: The computation that is the program.
        unknown_loops: Names of loops whose number of rounds the text does not say. Their bodies
            count once.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.unknown_loops: set[str] = set()
        instructions: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line.startswith((" ", "\t")):
                instruction = _parse(line)
                if instruction:
                    instructions[instruction.name] = instruction
            elif header := _HEADER.match(line):
                instructions = {}
                computation = Computation(header[2], instructions)
                self.computations[computation.name] = computation
                if header[1]:
                    self.entry = computation

    def visits(self) -> Iterator[Visit]:
        """All instructions that run; those in the body of a loop with its number of rounds."""
        yield from self._visits(self.entry, 1, False)

    def _visits(self, computation: Computation, times: int, fused: bool) -> Iterator[Visit]:
        for instruction in computation.instructions.values():
            yield Visit(instruction, computation, times, fused)
            rounds, inside = times, fused
            if instruction.opcode == "while":
                rounds *= self.rounds(instruction, computation)
            elif instruction.opcode == "fusion":
                inside = True
            elif instruction.opcode not in ("call", "conditional", "async-start"):
                continue  # the function of a reduction counts as part of the reduction
            for name in instruction.called:
                yield from self._visits(self.computations[name], rounds, inside)

    def rounds(self, loop: Instruction, computation: Computation) -> int:
        """How often a loop runs its body; 1 where the text does not say it.

        Args:
            loop: The `while` instruction.
            computation: The computation that contains it.
        """
        if known := _TRIP_COUNT.search(loop.attributes):
            return int(known[1])
        condition = self.computations[_CONDITION.search(loop.attributes)[1]]
        limit = self._limit(condition, computation, loop)
        if limit is None:
            self.unknown_loops.add(loop.name)
            return 1
        return limit

    def _limit(self, condition: Computation, around: Computation, loop: Instruction) -> int | None:
        """N if the condition is `counter < N`: JAX counts the rounds of a scan as 0, 1, 2, ..."""
        root = condition.root
        direction = _DIRECTION.search(root.attributes)
        if root.opcode != "compare" or not direction or direction[1] != "LT":
            return None
        limit = condition.instructions.get(root.operands[1])
        if limit is not None and limit.opcode == "get-tuple-element":
            # The loop carries the limit along unchanged: it is the value that the loop began with.
            index = int(limit.attribute(r"index=(\d+)"))
            limit = around.instructions.get(around[loop.operands[0]].operands[index])
        while limit is not None and limit.opcode in ("copy", "bitcast"):
            limit = around.instructions.get(limit.operands[0])
        if limit is None or limit.opcode != "constant" or not limit.operands[0].isdigit():
            return None
        return int(limit.operands[0])


def _element_bytes(dtype: str) -> float:
    if dtype in _BYTES:
        return _BYTES[dtype]
    return int(re.search(r"\d+", dtype)[0]) / 8  # f32, s32, u8, f8e4m3fn, ...


def _parse(line: str) -> Instruction | None:
    """Reads an instruction from its line; None for a line without one."""
    line = _COMMENT.sub("", line)
    begin = _LINE.match(line)
    if not begin:
        return None
    end = _closing(line, begin.end()) if line[begin.end()] == "(" else line.index(" ", begin.end())
    opcode = _OPCODE.match(line, end)
    close = _closing(line, opcode.end() - 1)
    inside = line[opcode.end() : close - 1]
    operands = tuple(_NAME.findall(inside) or filter(None, inside.split(", ")))
    return Instruction(
        name=begin[2],
        opcode=opcode[1],
        shapes=_shapes(line[begin.end() : end]),
        operands=operands,
        attributes=line[close:],
        root=bool(begin[1]),
    )


def _closing(text: str, start: int) -> int:
    """The place after the bracket that closes the bracket at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"no closing bracket in {text[start : start + 80]!r}")


@functools.cache
def _shapes(text: str) -> tuple[Shape, ...]:
    """The shapes of all arrays of a type, which may be a tuple."""
    return tuple(_shape(*match.groups()) for match in _SHAPE.finditer(text))


def _shape(dtype: str, dims: str, layout: str | None) -> Shape:
    sizes = tuple(int(d.removeprefix("<=")) for d in dims.split(",") if d)
    order, _, rest = (layout or "").partition(":")
    tile = re.search(r"T\(([\d,]+)\)", rest)
    memory = re.search(r"S\((\d+)\)", rest)
    padded = math.prod(sizes)
    if tile and sizes:
        minor_first = [sizes[int(axis)] for axis in order.split(",")]
        for place, size in enumerate(reversed(tile[1].split(","))):
            if place < len(minor_first):
                minor_first[place] = math.ceil(minor_first[place] / int(size)) * int(size)
        padded = math.prod(minor_first)
    return Shape(dtype, sizes, padded, int(memory[1]) if memory else 0)
