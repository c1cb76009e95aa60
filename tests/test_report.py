"""What a run says of its speed: use of the device, goodput, waiting for data, traces."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from conprediff_jax.train import report, throughput
from conprediff_jax.train.spec import TrainSpec


class Watch:
    """A clock that is set by hand."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        clock = types.SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(throughput, "time", clock)
        monkeypatch.setattr("conprediff_jax.progress.time", clock)

    def batches(self, seconds):
        while True:
            self.now += seconds
            yield {}


class Result:
    """A step's result, there or still being computed."""

    def __init__(self, ready):
        self.ready = ready

    def is_ready(self):
        return self.ready


class Quarter(throughput.MeasuredStep):
    """A step that takes a quarter of the device's peak at one a second."""

    def peak_share(self):
        return 0.25


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


def test_waiting_counts_only_while_the_device_is_idle(watch):
    clock = throughput.Clock(began=60.0)
    batches = watch.batches(2.0)
    clock.fetch(batches, Result(ready=False))  # it computes meanwhile: nothing is lost
    clock.fetch(batches, Result(ready=True))
    watch.now += 4.0
    # Eight seconds of steps, two of them lost; 48 since the run was started.
    assert clock.interval(8.0) == {"speed/data_wait": 0.25, "speed/goodput": 6.0 / 48.0}
    watch.now += 10.0
    assert clock.interval(10.0) == {"speed/data_wait": 0.0, "speed/goodput": 16.0 / 58.0}


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_a_run_that_waits_for_data_is_told_so(seconds, watch, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    spec = TrainSpec(steps=5, log_every=2, batch_size=4)
    reporter = report.Reporter(str(tmp_path), spec, 0, lambda: "none", began=90.0)
    reporter.measure(Quarter(jax.jit(lambda state, batch: state), 0))
    batches = watch.batches(seconds)
    for step in range(1, 6):
        reporter.fetch(batches)
        watch.now += 2.0  # the step
        reporter.add(step, {"loss": jnp.float32(1.0)})
    reporter.close()
    events = EventAccumulator(str(tmp_path)).Reload()

    def last(name):
        return float(tensor_util.make_ndarray(events.Tensors(name)[-1].tensor_proto))

    assert len(said) == (3 if seconds else 0)  # of steps 2, 3 to 4, and 5
    np.testing.assert_allclose(last("speed/data_wait"), seconds / (2 + seconds), rtol=1e-6)
    np.testing.assert_allclose(last("speed/mfu"), 0.25 / (2 + seconds), rtol=1e-6)
    # Four of five steps count, the first one compiled; ten seconds went before.
    np.testing.assert_allclose(last("speed/goodput"), 4 * 2 / (10 + 5 * (2 + seconds)), rtol=1e-6)


def test_a_measured_step_is_the_step_compiled_once_and_traced(tmp_path, monkeypatch):
    jitted = jax.jit(lambda state, batch: (state @ batch, state.sum()))
    step = throughput.MeasuredStep(jitted, 7, trace="8:9", workdir=str(tmp_path))
    assert step.peak_share() is None
    state = batch = jnp.eye(32)
    for _ in range(3):
        state, total = step(state, batch)
    assert jitted._cache_size() == 0 and float(total) == 32.0
    assert len(list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))) == 1
    assert step.peak_share() is None  # nobody knows the peak of a CPU
    monkeypatch.setattr(throughput, "peak_flops", lambda kind: 2.0 * 32**3)
    np.testing.assert_allclose(step.peak_share(), 1.0, rtol=0.05)


@pytest.mark.parametrize("text", ["10", "5:4", "0:3", "a:b", "1:2:3"])
def test_a_window_of_steps_that_is_none(text):
    with pytest.raises(ValueError, match="START:STOP"):
        throughput.trace_window(text)
