"""FLOPs and memory traffic of a compiled program, with every round of its loops counted.

XLA's `cost_analysis()` counts the body of a loop once, however often it runs, and counts values in
on-core memory as if they were in HBM. This module applies the same rules to the text of the
program, but computes

    FLOPs = sum over instructions of rounds * FLOPs(instruction),                          (1)
    bytes = sum over instructions outside fusions of rounds * (bytes read + bytes written) (2)

Arrays count with the padding that the device stores, and arrays in on-core memory are left out. A
multiplication and an addition are two FLOPs. The FLOPs of products and convolutions are exact.
Everything else counts one FLOP an element, transcendental functions too; in networks its share is
small.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from conprediff_jax.xla.hlo import Computation, Instruction, Module, Shape

# Operations that neither compute nor move anything themselves.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_FREE |= {"opt-barrier", "partition-id", "replica-id", "domain"}
_FREE |= {"while", "call", "conditional", "async-start"}
# Operations that move or make data without computing anything.
_MOVES = _FREE | {"copy", "reshape", "transpose", "broadcast", "bitcast-convert", "concatenate"}
_MOVES |= {"slice", "pad", "reverse", "iota", "gather", "dynamic-slice", "dynamic-update-slice"}
_MOVES |= {"fusion", "custom-call", "rng-bit-generator", "infeed", "outfeed", "send", "recv"}
_SLICES = ("slice", "dynamic-slice", "gather")
# Custom calls that move nothing: one reserves memory, the other names adjacent buffers as one.
_NO_CALL = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"')
# Products and convolutions that run in cuBLAS and cuDNN on GPUs.
_LIBRARY = re.compile(r'custom_call_target="__(cublas|cudnn)\$([^"]+)"')
_VIEWS = ("bitcast", "copy", "reshape", "transpose")
_IN_PLACE = ("dynamic-update-slice", "scatter")


@dataclasses.dataclass(frozen=True)
class Cost:
    """The work of one device.

    Attributes:
        flops: FLOPs by equation (1).
        bytes: Memory traffic in bytes by equation (2).
    """

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.flops - other.flops, self.bytes - other.bytes)


def program_cost(module: Module) -> Cost:
    """Equations (1) and (2) for a whole program."""
    return sum(parts(module, ()).values(), Cost())


def parts(module: Module, scopes: Sequence[str]) -> dict[str, Cost]:
    """Equations (1) and (2) for parts of a program, by the `jax.named_scope` of instructions.

    This is an estimate: all bytes of a fusion count for the scope of its result, and instructions
    that the compiler has added, such as prefetches of parameters, have no scope.

    Args:
        module: The program.
        scopes: Names of scopes. An instruction in several of them counts for the first.

    Returns:
        Costs by scope; '' is the cost of instructions in none of the scopes.
    """
    costs = dict.fromkeys([*scopes, ""], Cost())
    for visit in module.visits():
        instruction = visit.instruction
        names = re.findall(r"\w+", instruction.attribute(r'op_name="([^"]*)"') or "")
        scope = next((scope for scope in scopes if scope in names), "")
        flops = visit.times * instruction_flops(instruction, visit.computation)
        moved = 0.0 if visit.fused else _traffic(instruction, visit.computation, module)
        costs[scope] += Cost(flops, visit.times * moved)
    return costs


def instruction_flops(instruction: Instruction, computation: Computation) -> float:
    """FLOPs of one run of an instruction, without those of the computations that it calls."""
    opcode = instruction.opcode
    if opcode == "custom-call":
        return _library_flops(instruction, computation)
    if opcode in _MOVES or opcode.endswith(("-start", "-done", "-update")):
        return 0.0
    out = instruction.shapes[0]
    if opcode == "dot":
        contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
        return _product_flops(instruction, computation, contracted)
    if opcode == "convolution":
        images, kernel = (computation[name].shapes[0] for name in instruction.operands)
        return _convolution_flops(instruction, images, kernel, out)
    if opcode in ("reduce", "all-reduce", "reduce-scatter"):
        # The operands are the arrays and, for a reduction, as many initial values.
        arrays = instruction.operands[: len(instruction.shapes)]
        return float(sum(_elements(computation[name].shapes) for name in arrays))
    if opcode == "reduce-window":
        # TPUs use windows as large as the array to reduce it and broadcast the result.
        return float(computation[instruction.operands[0]].shapes[0].elements + out.elements)
    return float(_elements(instruction.shapes))


def _elements(shapes: Iterable[Shape]) -> int:
    return sum(shape.elements for shape in shapes)


def _library_flops(instruction: Instruction, computation: Computation) -> float:
    """FLOPs of the product or convolution in a call of cuBLAS or cuDNN; 0 for other calls."""
    library = _LIBRARY.search(instruction.attributes)
    if library is None:
        return 0.0
    if library[1] == "cublas":
        contracted = instruction.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]') or ""
        return _product_flops(instruction, computation, contracted.replace('"', ""))
    if not library[2].startswith("conv"):
        return 0.0
    # Labels and window are those of the forward convolution, also in a call for a gradient, whose
    # result is another one of the three arrays. The same pairs of elements are multiplied.
    left, right = (computation[name].shapes[0] for name in instruction.operands[:2])
    result = instruction.shapes[0]
    if library[2] == "convBackwardInput":
        return _convolution_flops(instruction, result, right, left)
    if library[2] == "convBackwardFilter":
        return _convolution_flops(instruction, left, result, right)
    return _convolution_flops(instruction, left, right, result)


def _product_flops(instruction: Instruction, computation: Computation, contracted: str) -> float:
    """Two FLOPs for every pair of a result's element and an element of the contracted axes."""
    left = computation[instruction.operands[0]].shapes[0].dims
    depth = math.prod(left[int(d)] for d in contracted.split(",") if d)
    return 2.0 * instruction.shapes[0].elements * depth


def _convolution_flops(
    instruction: Instruction, images: Shape, kernel: Shape, result: Shape
) -> float:
    """Two FLOPs for every product of an input and a kernel element; none for padding or gaps."""
    image, taps, output = images.dims, kernel.dims, result.dims
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""
    groups = int(instruction.attribute(r"feature_group_count=(\d+)") or 1)
    batch_groups = int(instruction.attribute(r"batch_group_count=(\d+)") or 1)
    pairs = 1
    spatial = [c for c in labels[1] if c.isdigit()]
    for axis in sorted(spatial, key=int):
        sizes = image[labels[1].index(axis)], taps[labels[2].index(axis)]
        pairs *= _meetings(*sizes, output[labels[3].index(axis)], window, int(axis))
    batch, inputs = image[labels[1].index("b")], image[labels[1].index("f")]
    outputs = taps[labels[2].index("o")]
    return 2.0 * pairs * (batch // batch_groups) * (inputs // groups) * outputs


def _meetings(size: int, kernel: int, output: int, window: str, axis: int) -> int:
    """Pairs (output, kernel element) along one dimension that read an element, not padding."""

    def option(name: str, default: str) -> str:
        match = re.search(rf"\b{name}=([\w\-]+)", window)
        return match[1].split("x")[axis] if match else default

    stride = int(option("stride", "1"))
    low = int(option("pad", "0_0").split("_")[0])
    dilation, base = int(option("rhs_dilate", "1")), int(option("lhs_dilate", "1"))
    # Output o and kernel element k read the place o * stride + k * dilation - low. It is an element
    # if it is a multiple of base in [0, (size - 1) * base]. TPUs turn batched products of matrices
    # into windows of thousands of elements, so outputs are counted by formula, not enumerated.
    offset = low - np.arange(kernel) * dilation
    first = np.maximum(-(-offset // stride), 0)
    last = np.minimum((offset + (size - 1) * base) // stride, output - 1)
    common = math.gcd(stride, base)
    period = base // common
    residue = offset // common * pow(stride // common, -1, period) % period
    met = (last - residue) // period - (first - 1 - residue) // period
    return int(np.where(offset % common == 0, np.maximum(met, 0), 0).sum())


def _traffic(instruction: Instruction, computation: Computation, module: Module) -> float:
    """Bytes that one run of an instruction outside fusions reads from memory and writes to it."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0.0
    if opcode == "custom-call" and _NO_CALL.search(instruction.attributes):
        return 0.0
    if opcode == "fusion":
        return _fusion_traffic(instruction, computation, module)
    if opcode in _SLICES:
        source = computation[instruction.operands[0]].shapes[0]
        part = sum(shape.nbytes for shape in instruction.shapes)
        return float(_stored(instruction.shapes) + (0 if source.memory else part))
    if opcode == "dynamic-update-slice":
        update = computation[instruction.operands[1]].shapes[0]
        return float(_stored([update]) + (0 if instruction.shapes[0].memory else update.nbytes))
    read = 0.0 + sum(
        _stored(computation[name].shapes) for name in _inputs(instruction, computation)
    )
    if opcode == "slice-start":
        return float(2 * _stored(instruction.shapes[1:2]) or instruction.shapes[1].nbytes)
    if opcode == "copy-start":
        return read + _stored(instruction.shapes[:1])
    if opcode.endswith("-start"):
        # The result is a tuple of the operand, the output and flags.
        return read + _stored(instruction.shapes[1:2])
    return read + _stored(instruction.shapes)


def _inputs(instruction: Instruction, computation: Computation) -> list[str]:
    """Names of the operands, each of them once."""
    return [
        name for name in dict.fromkeys(instruction.operands) if name in computation.instructions
    ]


def _stored(shapes: Iterable[Shape]) -> int:
    """Bytes of the arrays that lie in HBM."""
    return sum(shape.nbytes for shape in shapes if not shape.memory)


def _fusion_traffic(instruction: Instruction, computation: Computation, module: Module) -> float:
    """Bytes that a fusion reads and writes; an operand that is only sliced counts by its slices."""
    inner = module.computations[instruction.called[0]]
    total = 0.0
    for place, name in enumerate(instruction.operands):
        shapes = computation[name].shapes
        if shapes[0].memory:
            continue
        read = _read(inner.parameters[place], inner, module)
        total += _stored(shapes) if read is None else min(_stored(shapes), read)
    root = inner.root
    results = [inner[o] for o in root.operands] if root.opcode == "tuple" else [root]
    for shape, result in zip(instruction.shapes, results, strict=False):
        while result.opcode in _VIEWS:
            result = inner[result.operands[0]]
        if shape.memory or result.opcode == "parameter":
            continue  # in on-core memory, or an operand that is returned as it is
        in_place = result.opcode == "dynamic-update-slice"
        total += inner[result.operands[1]].shapes[0].nbytes if in_place else shape.nbytes
    return total


def _read(parameter: Instruction, inner: Computation, module: Module) -> float | None:
    """Bytes that a fusion reads of a parameter; None for the whole parameter."""
    total = 0.0
    for user in inner.users.get(parameter.name, []):
        first = user.operands[0] == parameter.name
        if user.opcode in _SLICES and first:
            total += sum(shape.nbytes for shape in user.shapes)
            continue
        if (user.root and user.opcode == "tuple") or (user.opcode in _IN_PLACE and first):
            continue  # returned as it is, or written in place
        read = None
        if user.opcode == "bitcast":
            read = _read(user, inner, module)
        elif user.opcode == "fusion":
            nested = module.computations[user.called[0]]
            places = [i for i, name in enumerate(user.operands) if name == parameter.name]
            reads = [_read(nested.parameters[place], nested, module) for place in places]
            read = None if None in reads else sum(reads)
        if read is None:
            return None
        total += read
    return total
