"""How well a run uses its machine: FLOPs of the step, waiting for data, and traces for a profiler.

    MFU      = FLOPs of a step x steps a second / peak FLOP/s                              (1)
    goodput  = time spent on steps / time since the run was started                        (2)

(1) counts what the compiled step computes on one device, loops as often as they run (see
`planning.cost`), recomputed activations included, against the device's bf16 peak; Chowdhery et al.
2022 (arXiv 2204.02311), appendix B, leave recomputation out. (2) leaves out starting, compiling,
pauses for samples, evaluations and checkpoints, and waiting for data.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from absl import logging

from conprediff_jax.tasks.spec import trace_window
from conprediff_jax.xla.chips import peak_flops
from conprediff_jax.xla.cost import program_cost
from conprediff_jax.xla.hlo import Module

# Above this share of an interval, waiting for data is worth a warning.
WAITING = 0.2


class MeasuredStep:
    """A train step that is compiled once, knows its FLOPs, and is traced when it is asked to be.

    Call it as the step itself. The first call compiles.

    Args:
        train_step: The jitted step.
        first_step: Steps done before this run of the program.
        trace: 'START:STOP', the steps to trace, both included; '' for none.
        workdir: Traces are written here, where TensorBoard finds them beside the events.
    """

    def __init__(
        self, train_step: Callable[..., Any], first_step: int, trace: str = "", workdir: str = ""
    ):
        self._jitted, self._compiled = train_step, None
        self._step, self._workdir = first_step, workdir
        self._start, self._stop = trace_window(trace) if trace else (0, 0)
        self._tracing = False

    def __call__(self, state: Any, batch: Any) -> Any:
        """The next step."""
        if self._compiled is None:
            self._compiled = self._jitted.lower(state, batch).compile()
        self._step += 1
        if self._start <= self._step <= self._stop and not self._tracing:
            jax.profiler.start_trace(self._workdir)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=self._step):
            result = self._compiled(state, batch)
        if self._tracing and self._step == self._stop:
            jax.block_until_ready(result)
            self.close()
        return result

    def close(self) -> None:
        """Writes a trace that is still running."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            logging.info(
                "trace of steps up to %d: tensorboard --logdir %s (with xprof installed)",
                self._step, self._workdir,
            )  # fmt: skip

    def peak_share(self) -> float | None:
        """(1) at one step a second; None where the device's peak is not known, as on CPUs."""
        peak = peak_flops(jax.devices()[0].device_kind)
        if peak is None or self._compiled is None:
            return None
        return program_cost(Module(self._compiled.as_text())).flops / peak


class Clock:
    """Where a run's time goes: steps, and waiting for data.

    Waiting counts from the moment on when the device has nothing left to do: while it works, a
    batch that takes long costs nothing. That moment is noted by a thread that blocks on the output
    of the last step, as the caller is busy with the batch then. `close` ends the thread.

    Args:
        began: When the run was started, by `time.monotonic`.
    """

    def __init__(self, began: float | None = None):
        self._began = time.monotonic() if began is None else began
        self._waited = self._productive = 0.0
        self._watcher = ThreadPoolExecutor(1, "step-end")

    def fetch(self, batches: Iterator[Any], last: Any) -> Any:
        """The next batch, the time noted that the device waited for it.

        Args:
            batches: Where it comes from.
            last: An output of the last step that was started, not donated to a later one; None if
                that step has ended, or there was none.
        """
        began = time.monotonic()
        if last is None or last.is_ready():
            batch = next(batches)
            self._waited += time.monotonic() - began
            return batch
        end = self._watcher.submit(_end, last)
        batch = next(batches)
        now = time.monotonic()
        if last.is_ready():  # so the thread has its time, or is about to
            self._waited += max(now - max(end.result(), began), 0.0)
        else:
            end.cancel()  # nobody asks any more; it may be queued behind earlier steps
        return batch

    def interval(self, seconds: float) -> dict[str, float]:
        """Shares of an interval of steps that has just ended.

        Args:
            seconds: How long it was, pauses left out.
        """
        waited, self._waited = min(self._waited, seconds), 0.0
        self._productive += seconds - waited
        goodput = self._productive / max(time.monotonic() - self._began, 1e-9)
        return {"speed/data_wait": waited / seconds, "speed/goodput": goodput}

    def reset(self) -> None:
        """Forgets waits that belong to no interval, as before the first step."""
        self._waited = 0.0

    def close(self) -> None:
        """Ends the thread, once the step that it watches has ended; does not wait for it."""
        self._watcher.shutdown(wait=False, cancel_futures=True)


def _end(output: Any) -> float:
    """Waits for an output of a step; when it was there, by `time.monotonic`."""
    output.block_until_ready()
    return time.monotonic()
