"""Kills the processes of a run at random moments, and checks that its end is still the same.

    python benchmarks/chaos.py --kills=20 --processes=2

One run is left alone. Then `launch/local.py` starts the same run, and after each start one of its
processes, drawn at random, gets a signal at a random moment: while it starts, trains or saves. The
signal is SIGKILL with probability 3/4, otherwise SIGTERM. Parameters, optimiser state, moving
average and the place in the data must be the same at the end, bit for bit, as without the signals.
If a run ends before all kills are done, it is compared, and another run begins.

The runs train a small model for a few steps: --set changes keys of the config. You can set any
other key too, as `--config.seed=1`.
"""

import os
import pathlib
import queue
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags, logging

from conprediff_jax.cli import app, config_flag
from conprediff_jax.common.errors import UserError

_KILLS = flags.DEFINE_integer("kills", 20, "Number of kills.", lower_bound=0)
_PROCESSES = flags.DEFINE_integer("processes", 2, "Processes of a run.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the moments, the processes and the signals.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/chaos", "Folder; runs in it are deleted first.")
_CONFIG = config_flag.define("configs/openmoji.py")
_SET = flags.DEFINE_multi_string(
    "set",
    ["data.image_size=16", "model.channels=32", "model.head_channels=16", "train.batch_size=8",
     "train.steps=300", "train.checkpoint_every=10", "train.sample_every=0", "train.keep=2"],
    "Changes to the config, KEY=VALUE; the flag can be repeated.",
)  # fmt: skip

ROOT = pathlib.Path(__file__).parent.parent


class Run:
    """A run of the launcher in a workdir."""

    def __init__(self, workdir: pathlib.Path):
        self.workdir = workdir
        command = [
            *(sys.executable, "-m", "conprediff_jax.main", f"--workdir={workdir}"),
            f"--config={app.config_name().resolve()}",
            *(f"--config.{key}={value}" for key, value in settings().items()),
        ]
        options = [f"--processes={_PROCESSES.value}", "--devices=1", "--restarts=1000", "--"]
        self._launcher = subprocess.Popen(
            [sys.executable, "launch/local.py", *options, *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._starts: queue.Queue[list[int] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def next_start(self) -> list[int] | None:
        """Waits for the next start and returns its process ids; None if the run has ended."""
        return self._starts.get()

    def checkpoints(self) -> list[int]:
        """The steps that have a checkpoint."""
        folder = self.workdir / "checkpoints"
        return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._launcher.poll() is None

    def wait(self) -> None:
        """Waits until the run ends.

        Raises:
            UserError: The run failed.
        """
        if self._launcher.wait():
            raise UserError(f"the run failed, see {self.workdir}.log")

    def _read(self) -> None:
        """Writes the output to a file, and queues the process ids of every start."""
        with self.workdir.with_suffix(".log").open("w") as log:
            for line in self._launcher.stdout:
                log.write(line)
                log.flush()
                if line.startswith("local: started"):
                    self._starts.put([int(pid) for pid in line.split()[2:]])
        self._starts.put(None)


def settings() -> dict[str, Any]:
    """The changes to the config by key; `--config.KEY=VALUE` takes precedence over --set.

    Raises:
        UserError: A value of --set is not of the form KEY=VALUE.
    """
    for setting in _SET.value:
        if "=" not in setting:
            raise UserError(f"--set={setting}: give KEY=VALUE, such as train.steps=300")
    small = dict(setting.split("=", 1) for setting in _SET.value)
    return small | config_flag.given()


def main(argv: list[str]) -> None:
    """Runs, kills and compares."""
    del argv
    folder = pathlib.Path(_WORKDIR.value).expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in [*folder.glob("whole"), *folder.glob("killed_*/")]:
        shutil.rmtree(earlier)
    began, whole = time.monotonic(), Run(folder / "whole")
    while whole.running and not whole.checkpoints():
        time.sleep(0.1)
    startup = time.monotonic() - began
    whole.wait()
    logging.info("uninterrupted: first checkpoint after %.0f s", startup)
    expected = contents(whole)

    rng, kills, runs = random.Random(_SEED.value), 0, 0
    while kills < _KILLS.value or not runs:
        run = Run(folder / f"killed_{runs}")
        kills = harass(run, rng, kills, 2 * startup)
        run.wait()
        runs += 1
        differing = sorted(name for name, value in contents(run).items() if value != expected[name])
        if differing:
            raise UserError(f"{run.workdir} ends differently: {', '.join(differing[:5])}")
        logging.info("%s ends as the uninterrupted run: %d arrays", run.workdir, len(expected))
    print(f"{kills} kills, {runs} runs of {_PROCESSES.value} processes: the same end, bit for bit")


def harass(run: Run, rng: random.Random, kills: int, spread: float) -> int:
    """Kills one process of every start within `spread` seconds, and returns the new total."""
    while (pids := run.next_start()) is not None:
        if kills == _KILLS.value:
            continue
        time.sleep(rng.uniform(0, spread))
        victim, kind = rng.choice(pids), rng.choice([signal.SIGKILL] * 3 + [signal.SIGTERM])
        try:
            os.kill(victim, kind)
        except ProcessLookupError:  # the process has ended by itself
            continue
        kills += 1
        steps = run.checkpoints()
        logging.info("kill %d: %s, newest checkpoint %s", kills, kind.name, steps[-1:] or "none")
    return kills


def contents(run: Run) -> dict[str, bytes]:
    """The bytes of all arrays of the last checkpoint and of the place in the data, by name."""
    folder = run.workdir / "checkpoints" / str(run.checkpoints()[-1])
    found = {file.name: file.read_bytes() for file in (folder / "data").glob("process_*")}
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    for item in ("ema", "train"):
        tree = reader.metadata(folder / item).item_metadata.tree
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        arrays = reader.restore(folder / item, ocp.args.PyTreeRestore(restore_args=numpy))
        for path, array in jax.tree_util.tree_leaves_with_path(arrays):
            found[item + jax.tree_util.keystr(path)] = np.asarray(array).tobytes()
    return found


if __name__ == "__main__":
    app.run(main)
