"""The interface between the trainer and what it trains.

A task owns its modules, its losses and their gradients. The trainer owns the data, the mesh, the
optimiser, the moving average, the checkpoints and the log.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped, UInt8

from conprediff_jax.data import Tokenizer

Batch = dict[str, Shaped[Array, "batch ..."]]
Metrics = dict[str, Float[Array, ""]]


class Step(NamedTuple):
    """What a task computes in one step.

    Attributes:
        grads: Gradient of the batch's mean loss, in the shape of the parameters, float32.
        metrics: Float32 scalars; those named `loss...` are shown in the progress line.
        task_state: The task's state after the step.
        assigned: New values, by path, of parameters that the optimiser does not update; None if
            there are no such parameters.
    """

    grads: Any
    metrics: Metrics
    task_state: Any
    assigned: dict[tuple[str, ...], Array] | None = None


@runtime_checkable
class Task(Protocol):
    """Something that can be trained.

    Attributes:
        averaged: The key of the parameters whose moving average is kept, sampled and exported.
        batch_keys: The keys of a batch that `step` reads.
        num_classes: The number of classes; None when labels are not read.
        tokenizer: The tokenizer of captions; None when captions are not read.
    """

    averaged: str
    batch_keys: tuple[str, ...]
    num_classes: int | None
    tokenizer: Tokenizer | None

    def init(self) -> tuple[dict[str, Any], Any]:
        """Initial parameters, float32, and the task's state. The caller jits this."""
        ...

    def step(
        self, params: dict[str, Any], task_state: Any, batch: Batch, step: Int[Array, ""]
    ) -> Step:
        """Gradients and metrics of a batch. The caller jits this."""
        ...

    def preview(
        self, mesh: Mesh
    ) -> Callable[[Any, Any], UInt8[Any, "count height width channels"]]:
        """A function from the moving average and the task's state to images of a sample grid."""
        ...

    def describe(self) -> str:
        """One line for the log that says what is trained."""
        ...


def accumulate(grad: Callable, params: Any, parts: int, *batched: Any) -> tuple[Any, Any]:
    """Computes `grad(params, *batched)` in microbatches, one after the other.

    Args:
        grad: A function that returns two trees. One has means over the batch, such as gradients and
            metrics; the other has values for every example, with the batch as first axis.
        params: The parameters.
        parts: The number of microbatches; it must divide the batch size.
        *batched: Trees of arrays whose first axis is the batch.

    Returns:
        Both trees for the whole batch.
    """
    if parts == 1:
        return grad(params, *batched)

    # Every device keeps its own examples: microbatch m takes every parts-th example, not a block.
    split = jax.tree.map(lambda x: rearrange(x, "(b m) ... -> m b ...", m=parts), batched)
    shapes, _ = jax.eval_shape(grad, params, *jax.tree.map(lambda x: x[0], split))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(total, part):
        means, examples = grad(params, *part)
        return jax.tree.map(jnp.add, total, means), examples

    total, examples = jax.lax.scan(add, zeros, split)
    means = jax.tree.map(lambda leaf: leaf / parts, total)
    return means, jax.tree.map(lambda x: rearrange(x, "m b ... -> (b m) ..."), examples)
