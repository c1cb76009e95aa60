"""The `train` section: how long to train, and how often to log, save, sample and evaluate."""

import dataclasses
import re

from conprediff_jax.common.errors import FieldError
from conprediff_jax.common.keys import fixed
from conprediff_jax.tasks.power_averages import check_deviation

GATHER_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """The `train` section.

    Attributes:
        steps: Number of optimiser steps; a resumed run continues up to this step.
        batch_size: Examples per step, over all devices and processes.
        microbatches: Number of parts that a batch is computed in, one after the other, to save
            memory; the gradients are those of the whole batch.
        divide_update: Whether the `data` axis of the mesh divides parameters, optimiser state and
            averages between two steps. A device then updates its part only, and parameters are
            gathered once a step (Xu et al. 2020, arXiv 2004.13336).
        gather_dtype: The dtype in which `divide_update` gathers kernels and sums their gradients
            over the devices: 'float32', or 'bfloat16', which sends half and rounds.
        ema_decay: Decay of the moving average of the parameters, which is what is sampled. In the
            first steps it is lower: min(ema_decay, (1 + step) / (10 + step)).
        power_averages: Relative deviations of the power-function averages that are kept beside the
            moving average, such as (0.05, 0.10); `power_averages` explains them. Empty for none.
        log_every: Steps between two progress lines; logged metrics are means over these steps.
        sample_every: Steps between sample grids; 0 for a single grid at the end.
        eval_every: Steps between small evaluations (`metrics.small`); 0 for none.
        init_from: Workdir or exported folder whose denoiser and first stage a fresh run starts
            from; empty for none.
        profile: 'START:STOP', the steps to trace for a profiler; empty for none.
        checkpoint_every: Steps between checkpoints; the last step is saved as well.
        keep: Number of checkpoints to keep, the newest ones.
        keep_every: Steps between checkpoints that are kept for good, beside the newest ones; 0 for
            none.
    """

    steps: int = 100_000
    batch_size: int = 64
    microbatches: int = 1
    divide_update: bool = True
    gather_dtype: str = "float32"
    ema_decay: float = 0.9999
    power_averages: tuple[float, ...] = fixed(())
    log_every: int = 50
    sample_every: int = 5000
    eval_every: int = 0
    init_from: str = ""
    profile: str = ""
    checkpoint_every: int = 5000
    keep: int = 3
    keep_every: int = 0

    def __post_init__(self):
        if self.profile:
            trace_window(self.profile)
        for name in (
            "steps",
            "batch_size",
            "microbatches",
            "log_every",
            "checkpoint_every",
            "keep",
        ):
            if getattr(self, name) < 1:
                raise FieldError(name, f"is {getattr(self, name)}: it must be at least 1")
        for name in ("sample_every", "eval_every", "keep_every"):
            if getattr(self, name) < 0:
                raise FieldError(name, f"is {getattr(self, name)}: it must not be negative")
        if self.batch_size % self.microbatches:
            raise FieldError(
                "microbatches",
                f"is {self.microbatches}: it must divide batch_size {self.batch_size}",
            )
        if self.gather_dtype not in GATHER_DTYPES:
            raise FieldError(
                "gather_dtype", f"is {self.gather_dtype!r}: choose one of {GATHER_DTYPES}"
            )
        if not 0 <= self.ema_decay < 1:
            raise FieldError("ema_decay", f"is {self.ema_decay}: it must lie in [0, 1)")
        deviations = self.power_averages
        for deviation in deviations:
            check_deviation(deviation, "power_averages")
        if len(set(deviations)) < len(deviations):
            raise FieldError("power_averages", f"is {deviations}: it must not repeat a deviation")

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due after a step."""
        intervals = (self.checkpoint_every, self.keep_every or self.checkpoint_every)
        return step == self.steps or any(step % interval == 0 for interval in intervals)


def trace_window(text: str) -> tuple[int, int]:
    """The first and the last step to trace, read from 'START:STOP'.

    Raises:
        ValueError: The text has another form.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"profile is {text!r}: give 'START:STOP', the steps to trace, from 1 on")
    return int(match[1]), int(match[2])
