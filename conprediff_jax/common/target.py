"""The devices that a program is traced for, for code that depends on their kind or their mesh.

A program may be traced on a machine that has none of its devices, as for a plan of a TPU slice. So
such code must not ask JAX for the devices of this machine.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax
from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices of a program.

    Attributes:
        platform: 'cpu', 'gpu' or 'tpu', or 'any' for a program that runs on all of them.
        mesh: The mesh; None if it is not known, or is one device.
        batch_axes: The axes of the mesh that divide the examples of a batch.
        heads_axis: The axis of the mesh that divides the heads of attention.
    """

    platform: str
    mesh: Mesh | None = None
    batch_axes: tuple[str, ...] = ()
    heads_axis: str | None = None

    @property
    def divided(self) -> bool:
        """Whether arrays may be divided over several devices."""
        return jax.device_count() > 1 if self.mesh is None else self.mesh.size > 1


_TARGET: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def traced_for(target: Target) -> Iterator[None]:
    """A context whose programs are traced for these devices."""
    token = _TARGET.set(target)
    try:
        yield
    finally:
        _TARGET.reset(token)


def target() -> Target:
    """The devices of the program that is traced now: by default, those of this machine."""
    return _TARGET.get() or Target(jax.default_backend())
