"""How long to train and how often to say, save and show something."""

import dataclasses
import re

from conprediff_jax.common.errors import FieldError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """The `train` section.

    Attributes:
        steps: optimiser steps of the whole run; a resumed run goes on up to here.
        batch_size: examples a step, over all devices and processes.
        microbatches: parts that a batch is computed in, one after the other, to save memory;
            gradients are those of the whole batch.
        ema_decay: decay of the moving average of the denoiser, which is what is sampled from;
            early on it is lower, min(ema_decay, (1 + step) / (10 + step)).
        log_every: steps between progress lines and logged metrics (which are means over them).
        sample_every: steps between sample grids; 0 for one at the end only.
        eval_every: steps between small evaluations (`metrics.small`); 0 for none.
        init_from: workdir or exported folder whose denoiser and first stage a fresh run starts
            from; empty for none.
        profile: 'START:STOP', the steps to trace for a profiler; empty for none.
        checkpoint_every: steps between checkpoints; there is one at the end as well.
        keep: checkpoints kept, the newest.
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
    """First and last step to trace, from 'START:STOP'.

    Raises:
        ValueError: the text says something else.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"profile is {text!r}: give 'START:STOP', the steps to trace, from 1 on")
    return int(match[1]), int(match[2])
