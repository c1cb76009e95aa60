"""The account of a compiled program, and a lower bound of its run time.

    compute       FLOPs / peak FLOP/s                                                      (1)
    memory        HBM bytes / HBM bandwidth                                                (2)
    interconnect  bytes sent to other chips / ICI bandwidth                                (3)

The bound is the longest of these three times (the roofline model): it assumes that every unit works
at its peak, and that the other two times are hidden behind the longest. No real step is that fast,
but the bound serves to compare plans.
"""

import dataclasses
import time
from typing import Any

import jax

from conprediff_jax.planning import memory as memory_lib
from conprediff_jax.planning.memory import Memory
from conprediff_jax.xla import collectives as collectives_lib
from conprediff_jax.xla.chips import Chip
from conprediff_jax.xla.collectives import Collective
from conprediff_jax.xla.cost import Cost, parts
from conprediff_jax.xla.hlo import Module

_NOTHING = Cost()
# Scopes of the train step. The first match counts, so that calls of the first stage for context
# prediction are part of context prediction.
SCOPES = ("context_prediction", "first_stage", "denoiser", "optimizer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
    """The needs and the work of a program on every chip.

    Attributes:
        fits: Whether the program fits into the chip's memory.
        memory: What the memory is used for. If the program does not fit, only its arguments count.
        needed: Bytes in all. If the program does not fit, the bytes that the compiler asked for; 0
            if it did not say.
        cost: FLOPs and HBM bytes, with every round of a loop counted.
        parts: The cost by scope of the train step, see `cost.parts`; '' is the rest.
        xla: FLOPs and 'bytes accessed' of XLA's own `cost_analysis`, which counts bodies of loops
            once and on-core memory as HBM.
        collectives: All collectives.
        unknown_loops: Number of loops of unknown length, whose bodies count once.
        compile_seconds: Seconds that compiling took.
    """

    fits: bool
    memory: Memory
    needed: int
    cost: Cost = _NOTHING
    parts: dict[str, Cost] = dataclasses.field(default_factory=dict)
    xla: Cost = _NOTHING
    collectives: tuple[Collective, ...] = ()
    unknown_loops: int = 0
    compile_seconds: float = 0.0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Account":
        """Makes an account from the dict of `dataclasses.asdict`, also after a trip through JSON.

        Args:
            values: The dict. Keys that are no fields are ignored.
        """
        given = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        given["memory"] = Memory(**given["memory"])
        given["cost"], given["xla"] = Cost(**given["cost"]), Cost(**given["xla"])
        given["parts"] = {scope: Cost(**cost) for scope, cost in given["parts"].items()}
        given["collectives"] = tuple(
            Collective(**one | {"axes": tuple(one["axes"])}) for one in given["collectives"]
        )
        return cls(**given)

    @property
    def traffic(self) -> dict[str, dict[str, float]]:
        """Payload, traffic and number of collectives by mesh axis, see `collectives.by_axis`."""
        return collectives_lib.by_axis(self.collectives)

    @property
    def sent(self) -> float:
        """Bytes that a chip sends to other chips."""
        return sum((collective.traffic for collective in self.collectives), 0.0)

    @property
    def payload(self) -> float:
        """Bytes of the operands of all collectives on a chip."""
        return sum((collective.payload for collective in self.collectives), 0.0)

    @property
    def operations(self) -> int:
        """Number of collectives that run, with every round of a loop counted."""
        return sum(collective.times for collective in self.collectives)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds by equations (1) to (3)."""

    compute: float
    memory: float
    interconnect: float

    @property
    def step(self) -> float:
        """The lower bound of the run time, in seconds."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def bound_by(self) -> str:
        """The name of the longest time: `compute`, `memory` or `interconnect`."""
        times = dataclasses.asdict(self)
        return max(times, key=times.get)


def roofline(account: Account, chip: Chip) -> Roofline:
    """Computes equations (1) to (3)."""
    return Roofline(
        compute=account.cost.flops / chip.flops,
        memory=account.cost.bytes / chip.hbm_bandwidth,
        interconnect=account.sent / chip.ici_bandwidth,
    )


def compile_account(
    lowered: jax.stages.Lowered, given: Memory, mesh_shape: dict[str, int]
) -> Account:
    """Compiles a program and makes its account.

    Args:
        lowered: The program.
        given: The memory of its arguments.
        mesh_shape: Names and sizes of the axes of its mesh.

    Raises:
        JaxRuntimeError: The compiler fails for another reason than too little memory.
    """
    began = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = memory_lib.needed(error) or 0
        seconds = time.monotonic() - began
        return Account(fits=False, memory=given, needed=needed, compile_seconds=seconds)
    seconds = time.monotonic() - began
    module = Module(compiled.as_text())
    memory = memory_lib.program(compiled, module, given)
    analysis = compiled.cost_analysis()
    costs = parts(module, SCOPES)
    return Account(
        fits=True,
        memory=memory,
        needed=memory.total,
        cost=sum(costs.values(), _NOTHING),
        parts={scope: cost for scope, cost in costs.items() if cost != _NOTHING},
        xla=Cost(analysis.get("flops", 0.0), analysis.get("bytes accessed", 0.0)),
        collectives=tuple(collectives_lib.collectives(module, mesh_shape)),
        unknown_loops=len(module.unknown_loops),
        compile_seconds=seconds,
    )
