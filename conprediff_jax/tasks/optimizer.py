"""AdamW of optax with warm-up, a learning rate schedule and gradient clipping."""

import dataclasses
import math

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from conprediff_jax.common.errors import FieldError
from conprediff_jax.common.fields import require

SCHEDULES = ("constant", "cosine", "linear")

_TINY = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """The `optimizer` section.

    Attributes:
        learning_rate: The peak learning rate, which is reached after the warm-up.
        schedule: Learning rate after the warm-up: 'constant', or 'cosine' or 'linear' decay to 0 at
            the end.
        warmup_steps: Number of steps of linear warm-up.
        b1: Adam's decay of the first moment.
        b2: Adam's decay of the second moment.
        epsilon: The number that Adam adds to the denominator.
        weight_decay: Decoupled weight decay of kernels and embeddings, but not biases and norms.
        clip_norm: Limit of the gradient's global norm; 0 for none.
    """

    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise FieldError("schedule", f"is {self.schedule!r}: choose one of {SCHEDULES}")
        require(self, lambda x: 0 < x < math.inf, "be positive and finite", "learning_rate")
        # float32 rounds smaller numbers to 0, and 0 / 0 would follow where a gradient is 0.
        require(self, lambda x: _TINY <= x < math.inf, f"be at least {_TINY:.2g}", "epsilon")
        require(self, lambda x: 0 <= x < 1, "lie in [0, 1)", "b1", "b2")
        names = ("warmup_steps", "weight_decay", "clip_norm")
        require(self, lambda x: 0 <= x < math.inf, "not be negative, and finite", *names)

    def learning_rates(self, steps: int) -> optax.Schedule:
        """The learning rate at every step of a run of `steps`."""
        rest = max(1, steps - self.warmup_steps)
        decay = {
            "constant": optax.constant_schedule(self.learning_rate),
            "cosine": optax.cosine_decay_schedule(self.learning_rate, rest),
            "linear": optax.linear_schedule(self.learning_rate, 0.0, rest),
        }[self.schedule]
        if not self.warmup_steps:
            return decay
        # It begins with 1 / warmup_steps, not 0: the first step should change something.
        warmup = optax.linear_schedule(
            self.learning_rate / self.warmup_steps, self.learning_rate, self.warmup_steps - 1
        )
        return optax.join_schedules([warmup, decay], [self.warmup_steps])

    def make(self, steps: int) -> optax.GradientTransformation:
        """The optimiser for a run of `steps`."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity(),
            optax.adamw(
                self.learning_rates(steps),
                b1=self.b1,
                b2=self.b2,
                eps=self.epsilon,
                weight_decay=self.weight_decay,
                mask=decayed,
            ),
        )


def decayed(params: PyTree) -> PyTree:
    """Says of every parameter whether weight decay applies to it.

    Biases and scales are excluded by their names, because those of stacked blocks have two
    dimensions, as a kernel has.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim > 1 and path[-1].key not in ("bias", "scale"), params
    )
