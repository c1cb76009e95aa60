"""How arrays are divided over the mesh: a short list of rules that must cover every parameter.

A rule is a regular expression for the parameter's path, as `denoiser/down_0_block_1/conv_in/kernel`
is one, and says what the `tensor` axis divides: the outputs of a layer (the last dimension), its
inputs (the dimension before), or nothing. The first rule that matches counts. The `fsdp` axis then
divides the largest divisible dimension that is left, except the first dimension of stacked blocks,
over which a scan runs. The paths of optimiser moments and moving averages end in the path of their
parameter, so they are divided as it is. Scalars are replicated.

Between two steps, the `data` axis may divide all of this too (`held=True`). Then every device holds
and updates its part of the state only, and parameters are gathered once a step (weight-update
sharding; Xu et al. 2020, arXiv 2004.13336).

So a column-parallel layer computes the heads or hidden units of its device, and a row-parallel
layer merges them with one sum over the `tensor` axis; everything else is replicated along that axis
(Shoeybi et al. 2019, "Megatron-LM", arXiv 1909.08053, section 3). Heads are divided where the axis
divides their number; otherwise the outputs of the projections are gathered before attention.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from conprediff_jax.common.errors import ConfigError
from conprediff_jax.parallel.mesh import BATCH_AXES

OUTPUTS, INPUTS, NOTHING = -1, -2, None

# Projections that make heads or hidden units are divided by their outputs; projections that merge
# them are divided by their inputs.
RULES: tuple[tuple[str, int | None], ...] = (
    (r"attention/(query|key|value)/(kernel|bias)$", OUTPUTS),
    (r"attention/out/kernel$", INPUTS),
    (r"feed_forward/(in|gate)/(kernel|bias)$", OUTPUTS),
    (r"feed_forward/out/kernel$", INPUTS),
    (r"(kernel|bias|scale|embedding|stride_embedding|positional_\w+)$", NOTHING),
    (r"(quantizer/codebook|averages/(usage|sums)|frozen/codes|history/(squares|counts))$", NOTHING),
)

# The paths of parameters of blocks that run as one scan: their first dimension counts the blocks.
STACKED = re.compile(r"(^|/)blocks/")

# Gathering a smaller array costs more than keeping a copy on every device.
MIN_FSDP_SIZE = 2**12


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: the batch axes divide the first dimension and nothing else."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def tree_shardings(tree: Any, mesh: Mesh, *, held: bool = False) -> Any:
    """Shardings of a pytree of parameters, or of state whose paths end in those of parameters.

    Args:
        tree: A pytree of arrays or shape structs.
        mesh: A mesh with the axes `mesh.AXES`.
        held: Whether the `data` axis divides the arrays too, as they are held between two steps.

    Raises:
        ConfigError: No rule covers a parameter.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition(path_name(path), leaf.shape, mesh, held=held))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def partition(
    path: str, shape: tuple[int, ...], mesh: Mesh, *, held: bool = False
) -> PartitionSpec:
    """How the rules divide one array; see `tree_shardings`."""
    if not shape:
        return PartitionSpec()
    axes: list[Any] = [None] * len(shape)
    divided = _rule(path)
    if divided and -divided <= len(shape) and shape[divided] % mesh.shape["tensor"] == 0:
        axes[divided] = "tensor"
    fsdp = mesh.shape["fsdp"]
    within = range(bool(STACKED.search(path)), len(shape))
    free = [i for i in within if axes[i] is None and shape[i] % fsdp == 0]
    large = np.prod(shape) >= MIN_FSDP_SIZE
    if free and large:
        axes[max(free, key=lambda i: shape[i])] = "fsdp"
    if held and large and mesh.shape["data"] > 1:
        parts = [mesh.shape[axis] if axis else 1 for axis in axes]
        free = [i for i in within if shape[i] % (parts[i] * mesh.shape["data"]) == 0]
        if free:
            most = max(free, key=lambda i: shape[i] // parts[i])
            axes[most] = (axes[most], "data") if axes[most] else "data"
    return PartitionSpec(*axes)


def _rule(path: str) -> int | None:
    for pattern, divided in RULES:
        if re.search(pattern, path):
            return divided
    raise ConfigError(
        f"parameter {path} is covered by no sharding rule: add one to parallel/sharding.py"
    )


def path_name(path: tuple) -> str:
    """A pytree path as names joined by slashes."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process reads, and how many parts there are: (index, count).

    Raises:
        ValueError: The parts of the processes overlap, or differ in size.
    """
    return share_of(jax.process_index(), mesh.devices)


def share_of(process: int, devices: np.ndarray) -> tuple[int, int]:
    """As `batch_share`, for any process and an array of devices by (data, fsdp, tensor).

    Processes that differ only in their place along the `tensor` axis read the same part.
    """
    rows = devices.reshape(-1, devices.shape[-1])
    held: dict[int, set[int]] = {}
    for row, columns in enumerate(rows):
        for device in columns:
            held.setdefault(device.process_index, set()).add(row)
    parts = sorted({tuple(sorted(part)) for part in held.values()})
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != len(rows):
        raise ValueError(
            f"tensor is {devices.shape[-1]}: it must divide the devices of a process or be a "
            "multiple of them, so that processes hold whole parts of the batch"
        )
    return parts.index(tuple(sorted(held[process]))), len(parts)


def exchange(mesh: Mesh | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """A function that all processes call at the same time, to tell each other small arrays.

    It takes an array of one shape in all processes, and returns those of all parts of a batch,
    stacked in the order of the parts.

    Args:
        mesh: The mesh whose `batch_share` says who reads which part; None for a part for each
            process.
    """
    processes = range(jax.process_count())
    parts = [p if mesh is None else share_of(p, mesh.devices)[0] for p in processes]
    speakers = [parts.index(part) for part in range(max(parts) + 1)]

    def exchanged(own: np.ndarray) -> np.ndarray:
        every = multihost_utils.process_allgather(own)
        return np.asarray(every).reshape(len(parts), *own.shape)[speakers]

    return exchanged


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Joins the parts of a batch that the processes have read into global arrays.

    The call returns before the arrays are on the devices.

    Args:
        batch: The part of this process, as `batch_share` says.
        mesh: The mesh that the arrays are divided over.
    """
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
