"""What the trainer needs to know of the thing it trains.

A task owns its modules, its losses and their gradients; the trainer owns data, mesh, optimiser,
moving average, checkpoints and the log. Pixels, latents, tokens and the first stages themselves are
tasks.
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
        grads: gradient of the batch's mean loss, in the shape of the parameters, float32.
        metrics: float32 scalars; those named `loss...` are shown in the progress line.
        task_state: the task's own state after the step.
        assigned: parameters by path that do not descend but take these values; None for none.
    """

    grads: Any
    metrics: Metrics
    task_state: Any
    assigned: dict[tuple[str, ...], Array] | None = None


@runtime_checkable
class Task(Protocol):
    """Something to train.

    Attributes:
        averaged: the key of the parameters whose moving average is kept, sampled and handed on.
        batch_keys: the parts of a batch that `step` reads.
        num_classes: classes that labels must belong to; None when labels are not read.
        tokenizer: what makes token ids of captions; None when they are not read.
    """

    averaged: str
    batch_keys: tuple[str, ...]
    num_classes: int | None
    tokenizer: Tokenizer | None

    def init(self) -> tuple[dict[str, Any], Any]:
        """Parameters, float32, and the task's own state (None where it has none). To be jitted."""
        ...

    def step(
        self, params: dict[str, Any], task_state: Any, batch: Batch, step: Int[Array, ""]
    ) -> Step:
        """Gradients and metrics of a batch. To be jitted."""
        ...

    def preview(self, mesh: Mesh) -> Callable[[Any, Any], UInt8[Any, "count height width 3"]]:
        """A function from the moving average and the own state to images for the sample grid."""
        ...

    def describe(self) -> str:
        """One line for the log: what is trained."""
        ...


def accumulate(grad: Callable, params: Any, parts: int, *batched: Any) -> tuple[Any, Any]:
    """`grad(params, *batched)`, computed in so many microbatches one after the other.

    Args:
        grad: returns two trees: of means over the batch, such as gradients and metrics, and of
            values for every example, the batch in front.
        params: parameters.
        parts: microbatches; they must divide the batch.
        *batched: pytrees with the batch in front.

    Returns:
        Both trees for the whole batch.
    """
    if parts == 1:
        return grad(params, *batched)

    # Every device keeps its own examples: microbatch m takes each parts-th one, not a block.
    split = jax.tree.map(lambda x: rearrange(x, "(b m) ... -> m b ...", m=parts), batched)
    shapes, _ = jax.eval_shape(grad, params, *jax.tree.map(lambda x: x[0], split))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(total, part):
        means, examples = grad(params, *part)
        return jax.tree.map(jnp.add, total, means), examples

    total, examples = jax.lax.scan(add, zeros, split)
    means = jax.tree.map(lambda leaf: leaf / parts, total)
    return means, jax.tree.map(lambda x: rearrange(x, "m b ... -> (b m) ..."), examples)
