"""Where a device's memory goes.

What goes into a program is known before it is compiled: the shard of every array, counted here by
what it is. What a program needs besides is the compiler's to say: a block in which it places its
intermediate values. In the fullest moment of the program (see `liveness`) these are

    activations   values of the forward pass, kept for the backward pass,
    temporaries   everything else of the block: gradients, what is being computed, gaps.
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
    """Bytes on the fullest device.

    Attributes:
        parameters: of all networks.
        average: moving average.
        optimizer: moments.
        own_state: of the task, such as a frozen first stage.
        batch: one batch.
        activations: see the module docstring.
        temporaries: likewise.
        code: the program itself.
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
        """All of it."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


def shard_bytes(tree: Any) -> int:
    """Bytes of a pytree of shape structs on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def arguments(state: TrainState, batch: dict[str, Any]) -> Memory:
    """What a train step is given."""
    return Memory(
        parameters=shard_bytes(state.params),
        average=shard_bytes(state.ema),
        optimizer=shard_bytes((state.opt_state, state.step)),
        own_state=shard_bytes(state.extra),
        batch=shard_bytes(batch),
    )


def program(compiled: jax.stages.Compiled, module: Module, given: Memory) -> Memory:
    """What a compiled program needs in all.

    Args:
        compiled: the program.
        module: its text, read.
        given: what it is given.
    """
    stats = compiled.memory_analysis()
    activations = min(liveness.peak(module).activations, stats.temp_size_in_bytes)
    # Padding of arguments, and results that take no argument's place.
    padding = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return dataclasses.replace(
        given,
        activations=activations,
        temporaries=stats.temp_size_in_bytes - activations + max(0, padding - given.total),
        code=stats.generated_code_size_in_bytes,
    )


def needed(error: Exception) -> int | None:
    """Bytes that a program which does not fit would have needed, from the compiler's complaint."""
    match = _NEEDED.search(str(error))
    return int(float(match[1]) * _UNITS[match[2]]) if match else None
