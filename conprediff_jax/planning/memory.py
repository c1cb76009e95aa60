"""What the memory of a device is used for.

The arguments of a program are known before it is compiled: here, the shard of every array is
counted under what the array is for. The rest is known once the program is compiled: the compiler
places all intermediate values in one block. At the moment that needs most of it (see
`xla.liveness`), the block holds

    activations   values of the forward pass that are kept for the backward pass,
    temporaries   everything else: gradients, values of the current operation, and gaps.
"""

import dataclasses
import math
import re
from typing import Any

import jax

from conprediff_jax.tasks.state import TrainState
from conprediff_jax.xla import liveness
from conprediff_jax.xla.hlo import Module

_NEEDED = re.compile(r"([\d.]+)([KMGT])\)? (?:of|exceeds)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device.

    Attributes:
        parameters: The parameters of all networks that are trained.
        average: Their averages.
        optimizer: The moments of the optimiser.
        own_state: The state of the task, such as a frozen first stage.
        batch: One batch.
        activations: See the module docstring.
        temporaries: See the module docstring.
        code: The program itself.
    """

    parameters: int = 0
    average: int = 0
    optimizer: int = 0
    own_state: int = 0
    batch: int = 0
    activations: int = 0
    temporaries: int = 0
    code: int = 0

    @property
    def total(self) -> int:
        """The sum of all fields."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


def shard_bytes(tree: Any) -> int:
    """Bytes that a pytree of shape structs takes on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def arguments(state: TrainState, batch: dict[str, Any]) -> Memory:
    """The memory of the arguments of a train step."""
    return Memory(
        parameters=shard_bytes(state.params),
        average=shard_bytes((state.ema, state.power_averages)),
        optimizer=shard_bytes((state.opt_state, state.step)),
        own_state=shard_bytes(state.task_state),
        batch=shard_bytes(batch),
    )


def program(compiled: jax.stages.Compiled, module: Module, given: Memory) -> Memory:
    """The memory that a compiled program needs.

    Args:
        compiled: The program.
        module: The program as read from its text.
        given: The memory of its arguments.
    """
    stats = compiled.memory_analysis()
    activations = min(liveness.peak(module).activations, stats.temp_size_in_bytes)
    # The padding of arguments, and results that take the place of no argument.
    padding = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return dataclasses.replace(
        given,
        activations=activations,
        temporaries=stats.temp_size_in_bytes - activations + max(0, padding - given.total),
        code=stats.generated_code_size_in_bytes,
    )


def needed(error: Exception) -> int | None:
    """Bytes that a program which does not fit would need, from the message of the compiler."""
    match = _NEEDED.search(str(error))
    return int(float(match[1]) * _UNITS[match[2]]) if match else None
