"""Tests of the report of a run: device use, waiting for data, traces, progress and W&B."""

import functools
import gc
import io
import itertools
import json
import struct
import sys
import threading
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from conprediff_jax.common import progress
from conprediff_jax.common.errors import UserError
from conprediff_jax.tasks.spec import TrainSpec, trace_window
from conprediff_jax.train import logs, report, throughput


class Watch:
    """A clock that is set by hand. A thread that waits for a step sees the time of its end."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        self.waiter = threading.local()
        clock = types.SimpleNamespace(monotonic=lambda: getattr(self.waiter, "now", self.now))
        monkeypatch.setattr(throughput, "time", clock)
        monkeypatch.setattr("conprediff_jax.common.progress.time", clock)

    def batches(self, *seconds):
        for taken in itertools.cycle(seconds):
            self.now += taken
            yield {}


class Result:
    """The output of a step, which is ready at a given time."""

    def __init__(self, watch, end):
        self.watch, self.end = watch, end

    def is_ready(self):
        return self.end <= self.watch.now

    def block_until_ready(self):
        assert threading.current_thread() is not threading.main_thread()
        self.watch.waiter.now = self.end


class Device:
    """Computes steps one after the other, each as soon as it is given and the last one is done."""

    def __init__(self, watch, step_seconds):
        self.watch, self.step_seconds = watch, step_seconds
        self.end, self.idle = watch.now, 0.0

    def step(self):
        self.idle += max(self.watch.now - self.end, 0.0)
        self.end = max(self.watch.now, self.end) + self.step_seconds
        return Result(self.watch, self.end)


class Quarter(throughput.MeasuredStep):
    """A step that uses a quarter of the device's peak at one step per second."""

    def peak_share(self):
        return 0.25


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


@pytest.mark.parametrize(
    ("batches", "share"),
    [
        ([0.1], 0.0),  # many steps are in flight
        ([0.99], 0.0),
        ([1.02], 0.02 / 1.02),
        ([1.3], 0.3 / 1.3),
        ([5.0], 4.0 / 5.0),
        ([0.1, 0.1, 0.1, 3.9], 0.2 / 4.2),  # three steps in flight cover most of a slow batch
    ],
)
def test_waiting_counts_from_when_the_device_is_idle(batches, share, watch):
    clock, device = throughput.Clock(began=watch.now - 20.0), Device(watch, step_seconds=1.0)
    batches = watch.batches(*batches)
    last = device.step()
    for steps in (40, 80):  # two intervals
        began, idle = watch.now, device.idle
        for _ in range(steps):
            clock.fetch(batches, last)
            last = device.step()
        seconds, idle = watch.now - began, device.idle - idle
        values = clock.interval(seconds)
        np.testing.assert_allclose(values["speed/data_wait"], idle / seconds, atol=1e-9)
        np.testing.assert_allclose(values["speed/data_wait"], share, atol=0.01)
    passed = watch.now - 100.0
    np.testing.assert_allclose(
        values["speed/goodput"], (passed - device.idle) / (passed + 20.0), rtol=1e-9
    )
    clock.close()


def test_a_device_that_has_ended_before_waits_for_the_whole_batch(watch):
    clock, batches = throughput.Clock(began=60.0), watch.batches(2.0)
    clock.fetch(batches, None)
    clock.reset()  # before the first step
    clock.fetch(batches, None)
    clock.fetch(batches, Result(watch, end=watch.now))
    watch.now += 4.0
    # Eight seconds of steps, four of them lost; 50 since the run was started.
    assert clock.interval(8.0) == {"speed/data_wait": 0.5, "speed/goodput": 4.0 / 50.0}
    clock.close()


def test_a_step_that_still_runs_is_not_waited_for(watch):
    ended, watched = threading.Event(), threading.Event()

    class Running(Result):
        def is_ready(self):
            return ended.is_set()

        def block_until_ready(self):
            watched.set()
            ended.wait()

    before = set(threading.enumerate())
    clock = throughput.Clock()
    batches = watch.batches(1.0)
    outputs = [Running(watch, end=None) for _ in range(3)]
    alive = [weakref.ref(output) for output in outputs]
    for output in outputs:
        clock.fetch(batches, output)  # would not return if it waited
    assert watched.wait(60.0)
    (watcher,) = set(threading.enumerate()) - before
    clock.close()
    ended.set()
    watcher.join(60.0)
    assert not watcher.is_alive()
    assert clock.interval(3.0)["speed/data_wait"] == 0.0
    del outputs, output
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_a_run_that_waits_for_data_reports_it(seconds, watch, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    spec = TrainSpec(steps=5, log_every=2, batch_size=4)
    reporter = report.Reporter(str(tmp_path), spec, 0, lambda: "none", began=90.0)
    reporter.measure(Quarter(jax.jit(lambda state, batch: state), 0))
    batches, loss = watch.batches(seconds), jax.block_until_ready(jnp.float32(1.0))
    for step in range(1, 6):
        reporter.fetch(batches)
        watch.now += 2.0  # the step
        reporter.add(step, {"loss": loss})
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
def test_invalid_windows_of_steps_are_refused(text):
    with pytest.raises(ValueError, match="START:STOP"):
        trace_window(text)


# --- progress -------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def work(line):
    line.skip(2)
    line.compiling()
    for _ in range(3):
        line.within(1, 4)
        line.add(1)
    return line


def test_progress_is_a_bar_in_a_terminal_and_lines_elsewhere(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "info", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "tqdm", functools.partial(progress.tqdm, mininterval=0))
    work(progress.ProgressLine(5, "images", batch=1, about="samples"))
    drawn = sys.stderr.getvalue()
    assert "samples: " in drawn and "5 images [" in drawn and "images/s" in drawn
    assert drawn.endswith("\r")  # nothing is left of it
    ends = ["compiled in 0:00", "samples: 5/5 images in 0:00"]
    assert said[1:] == ends
    said.clear()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    work(progress.ProgressLine(5, "images", batch=1, about="samples", every=0.0))
    assert not sys.stderr.getvalue()
    assert set(ends) < set(said) and "samples: 3/5 images, step 1/4 of the next 1" in "".join(said)


# --- W&B ------------------------------------------------------------------------------------------


def wandb_records(path):
    """The records of a `.wandb` file: a header of 7 bytes, then LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    content, place, parts = path.read_bytes(), 7, []
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(b"".join(parts))
            parts.clear()


def test_a_run_on_wandb_keeps_its_id_and_our_steps(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "PROJECT": "ours"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    spec = TrainSpec(steps=6, log_every=2, batch_size=4)
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    for start, stop in ((0, 6), (4, 6)):  # killed after step 6, resumed from step 4
        reporter = report.Reporter(str(tmp_path), spec, start, lambda: "none", log=["wandb"])
        reporter.config({"seed": start, "model": {"channel_mult": [1, 2]}})
        reporter.text("command", "the command")
        for step in range(start + 1, stop + 1):
            reporter.add(step, {"loss": jnp.float32(step)})
        reporter.image(stop, "samples", pixels)
        reporter.close()
    wandb.teardown()
    name = (tmp_path / "wandb_id.txt").read_text().strip()
    files = sorted(
        tmp_path.glob(f"wandb/offline-run-*/run-{name}.wandb"), key=lambda p: p.stat().st_mtime_ns
    )
    histories = []
    for file, seed in zip(files, (0, 4), strict=True):
        records = list(wandb_records(file))
        (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
        assert (run.run_id, run.project, run.display_name) == (name, "ours", tmp_path.name)
        updates = [
            (item.key or "/".join(item.nested_key), json.loads(item.value_json))
            for record in records
            for part in (record.run.config, record.config)
            for item in part.update
        ]
        assert ("seed", seed) in updates
        rows = [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in r.history.item}
                for r in records if r.WhichOneof("record_type") == "history"]  # fmt: skip
        histories.append({row["_step"]: row for row in rows})
        (image,) = file.parent.glob("files/media/images/samples_*.png")
        np.testing.assert_array_equal(np.asarray(Image.open(image)), pixels)
        assert (file.parent / "files" / "command.txt").read_text() == "the command\n"
    assert [list(history) for history in histories] == [[2, 4, 6], [6]]
    assert [row["loss"] for row in histories[0].values()] == [1.5, 3.5, 5.5]
    assert histories[1][6]["loss"] == 5.5
    assert {"samples/_type", "samples/path"} <= histories[1][6].keys()


def test_logs_that_are_not_there_are_refused_before_anything_is_done(monkeypatch):
    with pytest.raises(UserError, match="log has 'wand': the logs are tensorboard, jsonl, wandb"):
        logs.check(["wand"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb, which is not installed: pip install"):
        logs.check(["jsonl", "wandb"])
