"""Tests of random damage to checkpoints: what was written is read, or one line names the fault."""

import functools
import pathlib
import shutil
import tempfile

import pytest
import small_run
from fuzzing import fuzz
from small_run import CONFIG, abstract, batches, for_inference, state_at
from tiny import assert_same

from conprediff_jax.common.errors import UserError
from conprediff_jax.runs.checkpoint import Checkpoints, newest_config

STEPS = (3, 6)
STRAYS = ("7", "03", "-1", "x", "_3", "a_7", "7.orbax-checkpoint-tmp", "unreadable-6", "²", "1e3")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return small_run.write(tmp_path_factory.mktemp("runs") / "written", *STEPS)


def damage(rng, folder):
    """Removes, empties, cuts, flips, adds, moves or copies something below a folder."""
    paths = sorted(folder.rglob("*"))
    if not paths:
        return
    path = paths[rng.integers(len(paths))]
    stray = path.parent / str(rng.choice(STRAYS))
    kind = rng.choice(["remove", "empty", "cut", "flip", "file", "folder", "move", "copy"])
    if kind == "file" and not stray.exists():
        stray.write_bytes(rng.bytes(20))
    elif kind == "folder" and not stray.exists():
        stray.mkdir()
    elif kind == "move" and not stray.exists():
        path.rename(stray)
    elif kind == "copy" and not stray.exists():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, stray)
    elif path.is_dir():
        shutil.rmtree(path)
        if kind == "empty":
            path.mkdir()
    elif kind == "remove":
        path.unlink()
    elif content := bytearray(path.read_bytes()):
        place = rng.integers(len(content))
        content[place] ^= 1 << rng.integers(8)
        path.write_bytes({"flip": content, "cut": content[:place]}.get(kind, b""))


def assert_one_line(error, run):
    assert str(run) in str(error) and "\n" not in str(error)


def check_looking(run):
    """What sampling and the like get: moving average and own state of one step, and the config."""
    with Checkpoints(str(run), read_only=True) as checkpoints:
        _, config, ema, task_state = checkpoints.restore_for_inference(for_inference)
        assert checkpoints.config() == newest_config(str(run)) == config == CONFIG
    state = state_at(int(task_state["history"][0]))
    assert_same((ema, task_state), (state.ema, state.task_state))


def check_going_on(run, saving):
    """What training gets; what it saves then is what is read from now on."""
    with Checkpoints(str(run)) as checkpoints:
        stream = batches()
        state = checkpoints.restore(abstract(), stream, CONFIG)
        step = 0 if state is None else int(state.step)
        if step:
            assert step in STEPS and next(stream)["index"] == step
            assert_same(state, state_at(step))
        if not saving:
            return
        checkpoints.save(state_at(step + 1), stream, CONFIG)
        checkpoints.wait()
        assert_same(checkpoints.restore(abstract(), batches(), CONFIG), state_at(step + 1))


def test_damaged_folders(written, tmp_path):
    def check(rng):
        with tempfile.TemporaryDirectory(dir=tmp_path) as name:
            run = pathlib.Path(shutil.copytree(written, pathlib.Path(name) / "run"))
            for _ in range(rng.integers(1, 4)):
                damage(rng, run / "checkpoints")
            going_on = functools.partial(check_going_on, saving=rng.random() < 0.2)
            for reader in (check_looking, going_on):
                try:
                    reader(run)
                except UserError as error:
                    assert_one_line(error, run)

    fuzz(check, few=20)
