"""Keeps activations divided by examples, so that parameters are gathered instead.

Where `fsdp` divides both the batch and the parameters, the compiler has a choice at every layer: it
can gather the parameters, or leave them in place and move the activations. ZeRO-3 gathers the
parameters, which costs the same for every batch size and resolution. Without the constraints of
this module, the compiler moves the activations of many transformer layers, and devices repeat each
other's work.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from conprediff_jax.common.target import Target, traced_for
from conprediff_jax.parallel.mesh import BATCH_AXES


@contextlib.contextmanager
def divided_batch(mesh: Mesh, *sizes: int) -> Iterator[None]:
    """A context to trace a program of the mesh in, so that its batches stay divided.

    In it, the outputs of Flax modules stay divided over the batch axes. The compiler divides all
    other dimensions as it likes. Where no axis divides parameters, the compiler needs no help, and
    the program is left as it is. Attention learns from the context on which devices it runs.

    Args:
        mesh: The mesh of the program.
        *sizes: Numbers of examples in its batches and microbatches. An array whose first dimension
            has one of these sizes is taken for a batch.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    sizes = {size for size in sizes if size % parts == 0}
    target = Target(mesh.devices.flat[0].platform, mesh, BATCH_AXES, "tensor")
    if parts == 1 or mesh.size == mesh.shape["data"] or not sizes:
        with traced_for(target):
            yield
        return

    def divided(value: Any) -> Any:
        if getattr(value, "ndim", 0) == 0 or value.shape[0] not in sizes:
            return value
        rest = [PartitionSpec.UNCONSTRAINED] * (value.ndim - 1)
        sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES, *rest))
        return jax.lax.with_sharding_constraint(value, sharding)

    def interceptor(method: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        del context
        return jax.tree.map(divided, method(*args, **kwargs))

    with traced_for(target), nn.intercept_methods(interceptor):
        yield
