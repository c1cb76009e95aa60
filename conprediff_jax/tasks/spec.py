"""The `train` section: how long to train, and how often to log, save, sample and evaluate."""

import dataclasses
import re

from conprediff_jax.common.errors import FieldError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """The `train` section.

    Attributes:
        steps: Number of optimiser steps; a resumed run continues up to this step.
        batch_size: Examples per step, over all devices and processes.
        microbatches: Number of parts that a batch is computed in, one after the other, to save
            memory; the gradients are those of the whole batch.
        ema_decay: Decay of the moving average of the parameters, which is what is sampled. In the
            first steps it is lower: min(ema_decay, (1 + step) / (10 + step)).
        log_every: Steps between two progress lines; logged metrics are means over these steps.
        sample_every: Steps between sample grids; 0 for a single grid at the end.
        eval_every: Steps between small evaluations (`metrics.small`); 0 for none.
        init_from: Workdir or exported folder whose denoiser and first stage a fresh run starts
            from; empty for none.
        profile: 'START:STOP', the steps to trace for a profiler; empty for none.
        checkpoint_every: Steps between checkpoints; the last step is saved as well.
        keep: Number of checkpoints to keep, the newest ones.
    """

    steps: int = 100_000
    batch_size: int = 64
    microbatches: int = 1
    ema_decay: float = 0.9999
    log_every: int = 50
    sample_every: int = 5000
    eval_every: int = 0
    init_from: str = ""
    profile: str = ""
    checkpoint_every: int = 5000
    keep: int = 3

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
        for name in ("sample_every", "eval_every"):
            if getattr(self, name) < 0:
                raise FieldError(name, f"is {getattr(self, name)}: it must not be negative")
        if self.batch_size % self.microbatches:
            raise FieldError(
                "microbatches",
                f"is {self.microbatches}: it must divide batch_size {self.batch_size}",
            )
        if not 0 <= self.ema_decay < 1:
            raise FieldError("ema_decay", f"is {self.ema_decay}: it must lie in [0, 1)")


def trace_window(text: str) -> tuple[int, int]:
    """The first and the last step to trace, read from 'START:STOP'.

    Raises:
        ValueError: The text has another form.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"profile is {text!r}: give 'START:STOP', the steps to trace, from 1 on")
    return int(match[1]), int(match[2])
