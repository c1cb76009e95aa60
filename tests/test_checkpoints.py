"""Tests of checkpoints: damage, name clashes, full disks, and deletion during reading."""

import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import pytest
import small_run
import tiny
from absl import logging
from ml_collections import ConfigDict
from small_run import CONFIG, abstract, batches, for_inference, state_at
from tiny import assert_same

from conprediff_jax.cli import app
from conprediff_jax.common.files import WriteError
from conprediff_jax.config import default_first_stage, text
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.config.sections import Change, changes
from conprediff_jax.runs import restore
from conprediff_jax.runs.checkpoint import CheckpointError, Checkpoints, newest_config
from conprediff_jax.train import loop

pytestmark = pytest.mark.every_python

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return small_run.write(tmp_path_factory.mktemp("runs") / "written", 3, 6)


@pytest.fixture
def run(written, tmp_path):
    """A copy of the run, to be damaged."""
    return shutil.copytree(written, tmp_path / "run")


def look(workdir, step=None):
    with Checkpoints(str(workdir), read_only=True) as checkpoints:
        return checkpoints.restore_for_inference(for_inference, step)


def resume(workdir, config=CONFIG):
    """The state of a run that continues, and its next record."""
    with Checkpoints(str(workdir)) as checkpoints:
        stream = batches()
        return checkpoints.restore(abstract(), stream, config), next(stream)["index"]


def assert_is_step(found, step):
    assert found[:2] == (step, CONFIG)
    assert_same(found[2:], (state_at(step).ema, state_at(step).task_state))


def folders(workdir):
    return sorted(os.listdir(workdir / "checkpoints"))


# --- damage ---------------------------------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_damage_to_any_file_is_detected(run):
    """One flipped bit in any file of any item: the older checkpoint is read, or the same one."""
    newest = run / "checkpoints" / "6"
    whole = shutil.copytree(newest, run / "whole")
    files = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file()]
    listed = json.loads((newest / "checksums" / "crc32.json").read_text())["crc32"]
    outside = ("_CHECKPOINT_METADATA", "commit_success.txt", "checksums/")
    assert {str(f) for f in files if not str(f).startswith(outside)} == listed.keys()
    for file in files:
        flip(newest / file)
        needed = file.parts[0] in ("config", "ema", "extra")
        steps = {3} if needed or file.name == "crc32.json" else {6}
        with_step = look(run)
        assert {with_step[0]} == steps, file
        assert_is_step(with_step, *steps)
        shutil.copy(whole / file, newest / file)


@pytest.mark.parametrize("damage", ["empty", "no_config", "cut_config", "no_ema", "no_checksums"])
def test_readers_skip_incomplete_checkpoints(damage, run):
    newest = run / "checkpoints" / "6"
    config = newest / "config" / "metadata"
    if damage == "empty":
        shutil.rmtree(newest)
        newest.mkdir()
    elif damage == "cut_config":
        config.write_text(config.read_text()[:50])
    else:
        folder = {"no_config": "config", "no_ema": "ema", "no_checksums": "checksums"}[damage]
        shutil.rmtree(newest / folder)
    assert_is_step(look(run), 3)
    assert newest_config(str(run)) == CONFIG
    with Checkpoints(str(run), read_only=True) as checkpoints:
        assert checkpoints.config() == CONFIG
    for number in ("", "-2", "-3"):  # the same step is damaged again and again
        state, record = resume(run)
        assert_same(state, state_at(3))
        assert record == 3 and f"unreadable-6{number}" in folders(run)
        shutil.copytree(run / "checkpoints" / "unreadable-6", newest)
    with pytest.raises(CheckpointError, match=r"\(tried \[6\]\): .*/6: "):
        look(run, 6)


def test_checkpoints_without_checksums_are_read(run, monkeypatch):
    from conprediff_jax.runs import checkpoint

    assert checkpoint._VERSION == 2
    monkeypatch.setattr(checkpoint, "_VERSION", 1)
    old = small_run.write(run.parent / "old", 4)
    monkeypatch.undo()
    shutil.rmtree(old / "checkpoints" / "4" / "checksums")
    assert_is_step(look(old), 4)
    assert_same(resume(old)[0], state_at(4))


def test_copies_of_checkpoints_under_other_numbers_do_no_harm(run):
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "3", checkpoints / "100")
    (checkpoints / "200").mkdir()
    (checkpoints / "300").write_text("")
    shutil.copytree(checkpoints / "3", checkpoints / "backup_400")
    (checkpoints / "500").symlink_to(checkpoints / "6")
    (checkpoints / "³").mkdir()
    assert_same(resume(run)[0], state_at(6))
    small_run.write(run, 9)
    assert_is_step(look(run), 9)
    assert {"300", "backup_400", "unreadable-100", "unreadable-200"} <= set(folders(run))


def test_a_failed_save_is_reported(run):
    with pytest.raises(CheckpointError, match=r"step 5 cannot be saved: .* holds step 6"):
        small_run.write(run, 5)


def test_a_workdir_without_checkpoints_is_reported(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="training has not written one yet"):
        look(tmp_path)
    with pytest.raises(CheckpointError, match="training has not written one yet"):
        restore.load_experiment(str(tmp_path))


def test_unfinished_checkpoints_are_removed(run):
    left = run / "checkpoints" / "9.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints" / "6", left)
    assert_is_step(look(run), 6)
    assert left.exists()  # who only looks leaves everything
    resume(run)
    assert folders(run) == ["3", "6"]


def test_switching_parameters_on_or_off_makes_another_model(run):
    with pytest.raises(CheckpointError, match=r"/6 was trained with another config.context.weight"):
        resume(run, CONFIG | {"context": {"weight": 0.0}})
    assert folders(run) == ["3", "6"]
    assert_same(resume(run, CONFIG | {"context": {"weight": 0.7}})[0], state_at(6))
    kept = CONFIG | {"train": {"power_averages": (0.1,)}}
    with pytest.raises(CheckpointError, match=r"with another config.train.power_averages"):
        resume(run, kept)
    trained, fixed = (ConfigDict(CONFIG | {"text": text("bert", weights=w)}) for w in ("", "a"))
    assert changes(fixed, trained) == [Change("text.weights", "", "a", "fixed")]
    plain, perceptual = default_first_stage("vq"), default_first_stage("vq")
    perceptual.loss.lpips_trunk = "b"
    assert changes(perceptual, plain) == [Change("loss.lpips_trunk", "", "b", "fixed")]


# --- at the same time -----------------------------------------------------------------------------


def test_a_run_that_keeps_one_checkpoint_can_be_read_while_it_writes(tmp_path):
    """A reader finds what it has listed deleted, and then what has been written meanwhile."""
    small_run.write(tmp_path, 1)
    ended = threading.Event()

    def keep_writing():
        small_run.write(tmp_path, *range(2, 12), keep=1)
        ended.set()

    writer = threading.Thread(target=keep_writing)
    writer.start()
    seen = [look(tmp_path)]
    while not ended.is_set():
        seen.append(look(tmp_path))
    writer.join()
    for found in seen:
        assert_is_step(found, found[0])
    assert look(tmp_path)[0] == 11


def test_milestones_are_kept_beside_the_newest(tmp_path):
    small_run.write(tmp_path, 1, 2, 3, 5, keep=2, keep_every=3)
    small_run.write(tmp_path, 6, 7, 8, keep=1, keep_every=3)
    assert folders(tmp_path) == ["3", "6", "8"]
    assert_is_step(look(tmp_path, 3), 3)


def test_a_checkpoint_deleted_after_listing_is_replaced_by_a_newer_one(run, monkeypatch):
    """The same in a fixed order: the folder is replaced between listing and opening."""
    from conprediff_jax.runs import checkpoint

    opened = checkpoint._open

    def late(path, items):
        if path.name == "6":
            (run / "checkpoints" / "6").rename(run / "six")
            shutil.rmtree(run / "checkpoints" / "3")
            shutil.copytree(run / "six", run / "checkpoints" / "7")
        return opened(path, items)

    monkeypatch.setattr(checkpoint, "_open", late)
    found = look(run)
    assert found[0] == 7
    assert_same(found[2], state_at(6).ema)


# --- no room --------------------------------------------------------------------------------------

FILLED = """
import resource, sys
import small_run
from conprediff_jax.cli import app
def main(argv):
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))
    small_run.write(argv[1], 9)
app.run(main, positional=1)
"""


def test_a_full_disk_is_reported_in_the_last_line(run):
    """Older checkpoints stay, the unfinished one is removed, and there is one message."""
    ended = subprocess.run(
        [sys.executable, "-c", FILLED, str(run)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    last = ended.stderr.splitlines()[-1]
    assert last == f"error: cannot write {run}/checkpoints/9: File too large"
    assert_is_step(look(run), 6)


def test_an_unwritable_workdir_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=f"cannot write {tmp_path}/file/run/checkpoints: "):
        Checkpoints(str(tmp_path / "file" / "run"))


def test_log_messages_with_wrong_arguments_are_written(capsys):
    handler = logging.PythonHandler(sys.stderr, app._OneLine())
    handler.addFilter(app._ours_or_serious)
    record = logging.logging.makeLogRecord(
        {"msg": "%d of\nthem", "args": ("a", "b"), "levelno": logging.logging.ERROR}
    )
    handler.handle(record)
    assert capsys.readouterr().err.endswith("%d of\n")


# --- the learning rate ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "rate"),
    [
        ({"train.steps": 10}, 5e-4 * (1 + math.cos(math.pi / 8))),
        ({"optimizer.schedule": "constant"}, 1e-3),
        ({"optimizer.learning_rate": 2e-3}, 1e-3 * (1 + math.cos(math.pi / 4))),
        ({"train.log_every": 3}, None),
    ],
)
def test_a_jump_of_the_learning_rate_is_reported(keys, rate, caplog):
    """After 3 steps: 2 of warm-up, then a quarter of the cosine of 6 steps, an eighth of 10's."""
    config = tiny.get_config()
    stored = json.loads(config.to_json())
    config.update_from_flattened_dict(keys)
    with caplog.at_level("WARNING"):
        loop._compare_learning_rates(make_experiment(config), stored, 3)
    before = 5e-4 * (1 + math.cos(math.pi / 4))
    if rate is None:
        assert not caplog.text
    else:
        assert f"goes on at {rate:.3g} where the run before was at {before:.3g}: " in caplog.text
