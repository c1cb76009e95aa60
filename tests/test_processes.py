"""Tests with several real processes: training as with one, kills, preemption and other numbers."""

import os
import queue
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import tiny
from quick import ROOT, environment
from test_precompute import CONFIG, OPTIONS

from conprediff_jax import config as config_lib
from conprediff_jax import data
from conprediff_jax.common.errors import UserError
from conprediff_jax.data import latents
from conprediff_jax.models.autoencoder import AutoencoderKL
from conprediff_jax.parallel import processes
from conprediff_jax.runs.batches import Batches
from conprediff_jax.train import loop
from conprediff_jax.train.precompute import precompute

pytestmark = pytest.mark.usefixtures("one_device")

STEPS = 200
OVERRIDES = {"optimizer.schedule": "constant", "train.checkpoint_every": 4, "train.keep": 1000}


class Launched:
    """A command under `launch/local.py`, and its output."""

    def __init__(self, module, *arguments, count=2, devices=1, restarts=0):
        options = [f"--processes={count}", f"--devices={devices}", f"--restarts={restarts}"]
        command = [sys.executable, "-m", f"conprediff_jax.{module}", *map(str, arguments)]
        self.launcher = subprocess.Popen(
            [sys.executable, "launch/local.py", *options, "--", *command],
            cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.said, self._lines = [], queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.launcher.stdout:
            self.said.append(line)
            self._lines.put(line)
        self._lines.put(None)

    def until(self, text):
        """The next line that contains a text."""
        while text not in (line := self._lines.get(timeout=300) or "the end"):
            assert line != "the end", "".join(self.said)
        return line

    def pids(self):
        """The processes of the next start."""
        return [int(pid) for pid in self.until("local: started").split()[2:]]

    def finished(self):
        """Waits for the end; all output."""
        assert self.launcher.wait(timeout=600) == 0, "".join(self.said)
        return "".join(self.said)


class Joined(Batches):
    """The batches of several processes, put together for one to train on."""

    def __init__(self, experiment, count):
        self.parts = []
        for index in range(count):
            iterator = data.make_iterator(
                experiment.data,
                batch_size=experiment.train.batch_size // count,
                seed=experiment.seed,
                process_index=index,
                process_count=count,
            )
            self.parts.append(Batches(iterator, (index, count)))

    def __next__(self):
        batches = [next(part) for part in self.parts]
        return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}

    def get_state(self):
        return self.parts[0].get_state()

    def restore(self, folder):
        for part in self.parts:
            part.restore(folder)


def config_of(images, steps):
    config = tiny.get_config()
    config.update_from_flattened_dict({**OVERRIDES, "data.name": str(images), "train.steps": steps})
    return config


def flags(images, workdir, steps, **mesh):
    settings = {**OVERRIDES, "data.name": images, "train.steps": steps}
    settings |= {f"mesh.{axis}": size for axis, size in mesh.items()}
    given = [f"--config.{key}={value}" for key, value in settings.items()]
    return [f"--config={ROOT / 'tests' / 'tiny.py'}", f"--workdir={workdir}", *given]


def steps_of(workdir):
    folders = (workdir / "checkpoints").glob("*")
    return sorted(int(folder.name) for folder in folders if folder.name.isdigit())


def assert_close(a, b):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("data") / "images")


def test_processes_train_as_one_does_whatever_happens_to_them(images, tmp_path, monkeypatch):
    """Killed, preempted, and continued by another number of processes on another mesh.

    The reference is one process on one device that is fed the batches of all of them.
    """

    def alone(workdir, steps, count):
        monkeypatch.setattr(loop, "_open_batches", lambda experiment, _: Joined(experiment, count))
        return loop.train(config_of(images, steps), str(workdir))

    # Two hosts of two devices: data parallel between them, tensor parallel inside.
    workdir = tmp_path / "run"
    mesh = {"dcn_data": 2, "tensor": 2}
    run = Launched("main", *flags(images, workdir, STEPS, **mesh), devices=2, restarts=1)
    victim = run.pids()[1]
    while not steps_of(workdir):
        run.until("steps/s")
    os.kill(victim, signal.SIGKILL)
    run.until("starting again")
    victim = run.pids()[1]
    assert int(run.until("resuming at step").split("at step")[1].split()[0]) >= 4
    os.kill(victim, signal.SIGTERM)  # to one of them alone
    stopped = int(run.until("asked to stop").split(" step ")[1].split()[0])
    run.until(f"exit code {processes.RESTART_CODE}, starting again")
    run.launcher.terminate()
    assert run.launcher.wait() != 0
    assert steps_of(workdir)[-1] == stopped < STEPS
    expected = alone(tmp_path / "reference", stopped, 2)
    assert_close(alone(workdir, stopped, 2), expected)  # has nothing to do but to restore

    # Four hosts of one device, which divide all parameters.
    end = stopped + 4
    Launched("main", *flags(images, workdir, end, fsdp=4), count=4).finished()
    assert_close(alone(workdir, end, 4), alone(tmp_path / "reference", end, 4))


def test_processes_encode_a_data_set_together(images, tmp_path):
    weights = tiny.write_autoencoder(tmp_path / "weights", AutoencoderKL(**OPTIONS))
    file = tmp_path / "latent.py"
    file.write_text(CONFIG.format(tests=ROOT / "tests", weights=weights, options=OPTIONS))
    together, alone = tmp_path / "together", tmp_path / "alone"
    given = {"config": file, "out": together, "shard_size": 5}
    given |= {"config.data.name": images, "config.first_stage.scale": 0.5}
    Launched("precompute", *(f"--{name}={value}" for name, value in given.items())).finished()
    config = tiny.get_config()
    with config.unlocked():
        config.first_stage = config_lib.latents("kl", str(weights), scale=0.5, **OPTIONS)
    config.data.name = str(images)
    precompute(config, str(alone), 5)
    names = {path.name for path in alone.iterdir()}
    assert {path.name for path in together.iterdir()} == names and len(names) == 6
    manifest = latents.read_manifest(str(alone))
    assert latents.read_manifest(str(together)) == manifest
    sources = []
    for folder in (together, alone):
        spec = data.DataSpec(name=str(images), image_size=8, flip=True, latents=str(folder))
        sources.append(data.open_data(spec))
    for index in range(manifest.count):
        for kind in ("latent", "mirrored"):
            found, expected = (source[index][kind] for source in sources)
            np.testing.assert_allclose(found, expected, atol=1e-5)


def run(module, *arguments, **settings):
    return subprocess.run(
        [sys.executable, "-m", f"conprediff_jax.{module}", *arguments],
        cwd=ROOT, env=environment() | settings, capture_output=True, text=True,
    )  # fmt: skip


NUMBERED = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_PROCESS_ID": "0"}


@pytest.mark.parametrize(
    ("call", "settings", "message"),
    [
        (processes.join, {"JAX_NUM_PROCESSES": "2"}, "COORDINATOR_ADDRESS is not: give all three"),
        (processes.join, NUMBERED | {"JAX_NUM_PROCESSES": "two"}, "is 'two': it must be a number"),
        (processes.refuse_several, {"SLURM_STEP_NUM_TASKS": "8"}, "TASKS is 8: this command runs"),
    ],
)
def test_incomplete_settings_of_processes_are_refused(call, settings, message, monkeypatch):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        call()


def test_commands_for_a_single_process_refuse_several():
    result = subprocess.run(
        [sys.executable, "-m", "conprediff_jax.prepare", "--name=x"],
        cwd=ROOT, env=environment() | {"JAX_NUM_PROCESSES": "2"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: JAX_NUM_PROCESSES is 2: this command")


# Tests that a script runs in the background ignore SIGINT, and so would the process.
HEEDING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_ctrl_c_saves_the_step_even_while_the_first_one_is_compiled(images, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HEEDING, "-m", "conprediff_jax.main",
         *flags(images, tmp_path, STEPS)],
        cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while "starting at step" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == -signal.SIGINT and "Traceback" not in rest
    (step,) = steps_of(tmp_path)
    assert "Ctrl-C: the run saves its step and ends; press again to end at once" in rest
    assert f"Ctrl-C: step {step} is saved; the same command continues" in rest
    assert not (tmp_path / "lock.json").exists()


ALONE = """
import jax
from jax.experimental import multihost_utils
from conprediff_jax.cli import app
from conprediff_jax.common.errors import UserError

def main(argv):
    if jax.process_index() == 1:
        raise UserError("wrong here alone")
    multihost_utils.sync_global_devices("nobody else comes")

app.run(main, several=True)
"""


def test_ctrl_c_ends_a_command_with_one_line_while_it_imports():
    command = ["-X", "importtime", "-m", "conprediff_jax.sample", "--workdir=x"]
    process = subprocess.Popen(
        [sys.executable, "-c", HEEDING, *command],
        cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (line := process.stderr.readline()).endswith("| conprediff_jax\n"):
        assert line
    process.send_signal(signal.SIGINT)
    said = [line for line in process.stderr if not line.startswith("import time:")]
    assert said == ["stopped by Ctrl-C before anything was begun\n"]
    assert process.wait() == -signal.SIGINT


def test_an_error_of_one_process_ends_all_at_once_with_its_code(tmp_path):
    (tmp_path / "alone.py").write_text(ALONE)
    command = ["launch/local.py", "--processes=2", "--", sys.executable, tmp_path / "alone.py"]
    ended = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment(), capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip
    assert ended.returncode == 2, ended
    assert "error: wrong here alone" in ended.stdout + ended.stderr
