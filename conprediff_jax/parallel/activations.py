"""Activations stay divided by examples, and parameters come to them.

Where `fsdp` divides both the batch and the parameters, the compiler has a choice at every layer: to
gather the parameters, or to keep them where they are and move activations about. ZeRO-3 is the
first, which costs the same whatever the batch and the resolution; left alone, the compiler takes
the second for many layers of a transformer, and has devices do one another's work besides.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from conprediff_jax.parallel.mesh import BATCH_AXES


@contextlib.contextmanager
def divided_batch(mesh: Mesh, *sizes: int) -> Iterator[None]:
    """Within it, what Flax modules return keeps its examples divided over the batch axes.

    To be entered while a program is traced. Other dimensions stay the compiler's to divide. Where
    nothing divides parameters the compiler needs no help, and the program is left as it is.

    Args:
        mesh: of the program.
        *sizes: examples of its (micro)batches: what has so many rows is taken to be one.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    sizes = {size for size in sizes if size % parts == 0}
    if parts == 1 or mesh.size == mesh.shape["data"] or not sizes:
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

    with nn.intercept_methods(interceptor):
        yield
