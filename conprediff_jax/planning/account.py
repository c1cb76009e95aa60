"""The account of a compiled program, and the time that it takes at best.

    compute       FLOPs / peak FLOP/s                                                      (1)
    memory        HBM bytes / HBM bandwidth                                                (2)
    interconnect  bytes sent to other chips / ICI bandwidth                                (3)

A roofline step takes the longest of the three, as if the other two were hidden behind it and every
unit worked at its peak. No real step is that fast: it is a bound, good for comparing plans.
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
# Named in the train step; what context prediction asks of the first stage is its own.
SCOPES = ("context_prediction", "first_stage", "denoiser", "optimizer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
    """What a program needs and does on every chip.

    Attributes:
        fits: whether it goes into the chip's memory.
        memory: where that goes; without what the compiler could not place, if it does not fit.
        needed: bytes in all; what the compiler asked for, if it does not fit.
        cost: FLOPs and HBM bytes, loops counted as often as they run.
        parts: the same by part of the train step, see `cost.parts`; '' is the rest.
        xla: FLOPs and 'bytes accessed' of XLA's own `cost_analysis`: bodies of loops counted once,
            on-core memory counted like HBM.
        collectives: all of them.
        unknown_loops: loops of unknown length, counted once.
        compile_seconds: what compiling took.
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
        """Of what `dataclasses.asdict` gave, from JSON or not; what is no field is left out."""
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
        """Collective bytes by mesh axis, see `collectives.by_axis`."""
        return collectives_lib.by_axis(self.collectives)

    @property
    def sent(self) -> float:
        """Bytes that a chip sends."""
        return sum((collective.traffic for collective in self.collectives), 0.0)

    @property
    def payload(self) -> float:
        """Bytes of the operands of all collectives."""
        return sum((collective.payload for collective in self.collectives), 0.0)

    @property
    def operations(self) -> int:
        """Collectives that run."""
        return sum(collective.times for collective in self.collectives)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds by (1) to (3)."""

    compute: float
    memory: float
    interconnect: float

    @property
    def step(self) -> float:
        """The bound."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def bound_by(self) -> str:
        """The longest of the three."""
        times = dataclasses.asdict(self)
        return max(times, key=times.get)


def roofline(account: Account, chip: Chip) -> Roofline:
    """Equations (1) to (3)."""
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
        lowered: the program.
        given: memory of its arguments.
        mesh_shape: of the mesh it is for.

    Raises:
        JaxRuntimeError: the compiler fails for another reason than too little memory.
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
