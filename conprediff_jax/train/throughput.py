"""How well a run uses the device: FLOPs of a step, time spent waiting for data, profiler traces.

    MFU      = FLOPs of a step x steps a second / peak FLOP/s                              (1)
    goodput  = time spent on steps / time since the run was started                        (2)

(1) counts the FLOPs of the compiled step on one device, with loops as often as they run (see
`xla.cost`) and recomputed activations, against the device's bfloat16 peak. Chowdhery et al. 2022
(arXiv 2204.02311), appendix B, leave recomputation out. In (2), time spent on steps does not
include starting, compiling, waiting for data, and pauses for samples, evaluations and checkpoints.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from absl import logging

from conprediff_jax.common.progress import COMPILING, clock
from conprediff_jax.data import aspects
from conprediff_jax.tasks.spec import trace_window
from conprediff_jax.xla.chips import peak_flops
from conprediff_jax.xla.cost import program_cost
from conprediff_jax.xla.hlo import Module

# Above this share of an interval, waiting for data is worth a warning.
WAITING = 0.2


class MeasuredStep:
    """A train step that is compiled ahead, knows its FLOPs, and can be traced.

    It is called like the train step itself. The first call compiles, once for each shape of images.

    Args:
        train_step: The jitted train step.
        first_step: Number of steps that were done before the program started.
        trace: 'START:STOP', the steps to trace, both included; empty for none.
        workdir: The folder for traces, where TensorBoard finds them beside the events.
        shapes: Heights and widths of the images (or latents) of batches, if there are several.
    """

    def __init__(
        self,
        train_step: Callable[..., Any],
        first_step: int,
        trace: str = "",
        workdir: str = "",
        shapes: Sequence[tuple[int, int]] = (),
    ):
        self._jitted, self._compiled, self._shapes = train_step, {}, shapes
        self._step, self._workdir = first_step, workdir
        self._start, self._stop = trace_window(trace) if trace else (0, 0)
        self._tracing = False

    def __call__(self, state: Any, batch: Any) -> Any:
        """Does the next step."""
        if not self._compiled:
            self._compile(state, batch)
        self._step += 1
        if self._start <= self._step <= self._stop and not self._tracing:
            jax.profiler.start_trace(self._workdir)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=self._step):
            result = self._compiled[_form(batch)](state, batch)
        if self._tracing and self._step == self._stop:
            jax.block_until_ready(result)
            self.close()
        return result

    def _compile(self, state: Any, batch: Any) -> None:
        """Compiles a program for the batch, and for batches with images of the other shapes."""
        if len(self._shapes) > 1:
            said = ", ".join(f"{width} x {height}" for height, width in self._shapes)
            logging.info("one program for each shape of batches: %s", said)
        logging.info("%s", COMPILING)
        began = time.monotonic()
        for each in (batch, *(_with_shape(batch, shape) for shape in self._shapes)):
            if _form(each) not in self._compiled:
                self._compiled[_form(each)] = self._jitted.lower(state, each).compile()
        logging.info("compiled in %s", clock(time.monotonic() - began))

    def close(self) -> None:
        """Ends a trace that is still running, and writes it."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            logging.info(
                "trace of steps up to %d: tensorboard --logdir %s (with xprof installed)",
                self._step, self._workdir,
            )  # fmt: skip

    def peak_share(self) -> float | None:
        """Equation (1) at one step a second; None if the device's peak is not known, as on CPUs.

        Where images have several shapes, it is that of the first batch.
        """
        peak = peak_flops(jax.devices()[0].device_kind)
        if peak is None or not self._compiled:
            return None
        program = next(iter(self._compiled.values()))
        return program_cost(Module(program.as_text())).flops / peak


def _form(batch: Any) -> tuple[tuple[int, ...], ...]:
    """The shapes of a batch's arrays."""
    return tuple(leaf.shape for leaf in jax.tree.leaves(batch))


def _with_shape(batch: dict[str, Any], shape: tuple[int, int]) -> dict[str, Any]:
    """A batch as abstract as compiling needs, with images (or latents) of another shape."""
    key = aspects.key_of(batch)
    image = batch[key]
    whole = (len(image), *shape, image.shape[-1])
    other = jax.ShapeDtypeStruct(whole, image.dtype, sharding=image.sharding)
    return {**batch, key: other}


class Clock:
    """Measures the time that a run spends on steps and on waiting for data.

    Waiting begins when the device has nothing left to do: while it works, a slow batch costs no
    time. A thread that blocks on the output of the last step notes when the step ended, since the
    caller is busy with the batch at that time. `close` ends the thread.

    Args:
        began: Time at which the program started, by `time.monotonic`; by default now.
    """

    def __init__(self, began: float | None = None):
        self._began = time.monotonic() if began is None else began
        self._waited = self._productive = 0.0
        self._watcher = ThreadPoolExecutor(1, "step-end")

    def fetch(self, batches: Iterator[Any], last: Any) -> Any:
        """Returns the next batch, and notes the time that the device waits for it.

        Args:
            batches: The iterator of batches.
            last: An output of the last step that was started, whose memory no later step reuses;
                None if that step has ended, or if there was none.
        """
        began = time.monotonic()
        if last is None or last.is_ready():
            batch = next(batches)
            self._waited += time.monotonic() - began
            return batch
        end = self._watcher.submit(_end, last)
        batch = next(batches)
        now = time.monotonic()
        if last.is_ready():  # so the thread has the end of the step, or soon will
            self._waited += max(now - max(end.result(), began), 0.0)
        else:
            end.cancel()  # its result is not needed; it may be queued behind earlier steps
        return batch

    def interval(self, seconds: float) -> dict[str, float]:
        """The share of waiting in an interval of steps that has just ended, and the goodput so far.

        Args:
            seconds: Length of the interval without pauses.
        """
        waited, self._waited = min(self._waited, seconds), 0.0
        self._productive += seconds - waited
        goodput = self._productive / max(time.monotonic() - self._began, 1e-9)
        return {"speed/data_wait": waited / seconds, "speed/goodput": goodput}

    def reset(self) -> None:
        """Forgets waiting that belongs to no interval, such as before the first step."""
        self._waited = 0.0

    def close(self) -> None:
        """Lets the thread end after the step that it watches; does not wait for it."""
        self._watcher.shutdown(wait=False, cancel_futures=True)


def _end(output: Any) -> float:
    """Waits for an output of a step, and returns the time at which it was ready."""
    output.block_until_ready()
    return time.monotonic()
