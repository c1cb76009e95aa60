"""Checkpoints, which orbax writes asynchronously and atomically.

A checkpoint is a folder of items that are read independently:

    <workdir>/checkpoints/<step>/
        ema             moving average of the parameters that are sampled
        power_averages  power-function averages of the same parameters, if the run keeps any
        extra           state of the task, such as a frozen first stage
        train           step, parameters and optimiser state
        data            states of the data iterators, one file per process; see `batches`
        config          the run's config
        checksums       checksums of all files of the items above; see `checksums`

Sampling opens only `ema`, `extra` and `config`. Checkpoints of earlier versions have no checksums,
and are read without them.
"""

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from conprediff_jax.common import blocks, buckets, hub
from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import absolute, is_address, writing
from conprediff_jax.config.sections import changes
from conprediff_jax.parallel import share
from conprediff_jax.runs import checksums
from conprediff_jax.runs.batches import Batches
from conprediff_jax.tasks.state import TrainState

T = TypeVar("T")

FOLDER = "checkpoints"

# Errors of the machine or the storage, not of a checkpoint: status codes in messages, and types.
_PASSING = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED|UNAUTHENTICATED"
    r"|PERMISSION_DENIED)\b|\bHTTP\D{0,20}(429|5\d\d)\b"
)
_PASSING_ERRORS = (ConnectionError, TimeoutError, MemoryError)

# Version of the item `extra`. From this version on, a checkpoint without checksums has lost them.
_VERSION = 2

_STEP = re.compile(r"0|[1-9][0-9]*")
_INFERENCE = ("config", "ema", "extra")
_TRAINING = (*_INFERENCE, "power_averages", "train", "data")


class CheckpointError(UserError):
    """A checkpoint that is missing, unreadable, or of another model."""


class _Opened(NamedTuple):
    """A checkpoint's config, and whether its files were compared with their checksums."""

    config: dict
    checked: bool


class Checkpoints:
    """The checkpoints of a workdir, as a context manager; leaving it finishes writing.

    Args:
        workdir: Workdir of the run; with `read_only`, it may be an address on the Hub.
        keep: Number of checkpoints to keep; older ones are deleted. None keeps all.
        keep_every: Checkpoints of steps that this number divides are kept for good; 0 for none.
        read_only: Whether nothing is written or deleted.

    Raises:
        CheckpointError: With `read_only`, there is no folder of checkpoints; or the workdir is in
            s3://, where orbax has no access.
        BucketError: The workdir is in a bucket that cannot be read.
        WriteError: The folder cannot be made.
    """

    def __init__(
        self,
        workdir: str,
        *,
        keep: int | None = None,
        keep_every: int = 0,
        read_only: bool = False,
    ):
        self.folder = _folder_of(hub.local(workdir) if read_only else workdir)
        self._arrays = ocp.StandardCheckpointHandler()
        self._manager: ocp.CheckpointManager | None = None
        self._written = self.folder  # or the checkpoint that is being written
        if not read_only:
            with writing(self.folder):
                self._manager = self._make_manager(keep, keep_every or None)
        elif not self.folder.is_dir():
            raise CheckpointError(
                f"no checkpoints in {self.folder}: a workdir is a folder that training wrote"
            )

    def _make_manager(self, keep: int | None, keep_every: int | None) -> ocp.CheckpointManager:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_partial()
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_every),
            item_handlers={
                "ema": ocp.StandardCheckpointHandler(),
                "extra": ocp.StandardCheckpointHandler(),
                "power_averages": ocp.StandardCheckpointHandler(),
                "train": ocp.StandardCheckpointHandler(),
                "data": grain.checkpoint.CheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
                checksums.ITEM: checksums.ChecksumHandler(),  # the last one
            },
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception) -> None:
        self._arrays.close()
        if self._manager is None:
            return
        try:
            with writing(self._written):
                self._manager.close()
        except Exception as error:
            if kind is None:
                raise
            logging.warning("%s", error)  # the error that ends the run came first, and says more
        finally:
            self._remove_partial()
            self._remove_empty()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; one still being written does not count."""
        return max(_steps(self.folder), default=None)

    @property
    def last_good(self) -> str:
        """The path of the newest complete checkpoint, for messages."""
        step = self.latest_step
        return "none yet" if step is None else str(self.folder / str(step))

    def goes_on(self) -> str:
        """Where a run goes on that ends now, for messages."""
        step = self.latest_step
        return "no step is saved yet" if step is None else f"the run goes on from step {step}"

    def save(self, state: TrainState, data: Batches, config: dict) -> None:
        """Starts to write a checkpoint; the state may be donated as soon as this returns.

        Args:
            state: The train state.
            data: The batches, whose place is saved.
            config: The run's config as plain data.

        Raises:
            CheckpointError: The folder holds checkpoints of later steps.
            WriteError: This checkpoint, or the one before it, cannot be written.
        """
        self.wait()
        step = int(state.step)
        self._written = self.folder / str(step)
        averages = {}
        if state.power_averages:
            averages["power_averages"] = ocp.args.StandardSave(state.power_averages)
        with writing(self._written):
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    ema=ocp.args.StandardSave(state.ema),
                    extra=ocp.args.StandardSave(_wrapped(state.task_state)),
                    train=ocp.args.StandardSave(_trained(state)),
                    data=grain.checkpoint.CheckpointSave(data),
                    config=ocp.args.JsonSave(config),
                    **averages,
                    **{checksums.ITEM: checksums.ChecksumSave()},
                ),
            )
        if not saved:
            raise CheckpointError(
                f"step {step} cannot be saved: {self.folder} holds step "
                f"{max(self._manager.all_steps())}, which this run has not written: move it away"
            )

    def wait(self) -> None:
        """Waits until all checkpoints are on disk.

        Raises:
            WriteError: A checkpoint cannot be written.
        """
        with writing(self._written):
            self._manager.wait_until_finished()

    def restore(self, abstract: TrainState, data: Batches, config: dict) -> TrainState | None:
        """The newest readable state; None if there is no checkpoint. `data` goes to its place.

        Another number of processes, on another mesh, may have written it. Unreadable checkpoints
        are named in the log and moved aside, so that new ones can take their names.

        Args:
            abstract: Shapes, dtypes and shardings of the state.
            data: The batches, which continue where the checkpoint was written.
            config: The run's config as plain data.

        Raises:
            CheckpointError: The checkpoint holds another model, or no checkpoint is readable.
            WriteError: An unreadable checkpoint cannot be moved.
        """

        def load(step: int, opened: _Opened) -> TrainState:
            path = self.folder / str(step)
            _check_same_model(config, opened.config, path)
            state = TrainState(
                ema=self._restored(path / "ema", abstract.ema),
                task_state=self._task_state(path, abstract.task_state, opened),
                power_averages=self.power_averages(step, abstract.power_averages),
                **self._restored(path / "train", _trained(abstract)),
            )
            if int(state.step) != step:
                raise ValueError(f"it is a copy of step {int(state.step)}")
            data.restore(path / "data")
            return state

        if not _steps(self.folder):
            return None
        return self._newest(_TRAINING, load, move_aside=True)

    def restore_for_inference(
        self, abstract: Callable[[dict], tuple[Any, Any]], step: int | None = None
    ) -> tuple[int, dict, Any, Any]:
        """The step, the config, the moving average and the task's state of a checkpoint.

        Args:
            abstract: A function from a config to shapes and shardings of the moving average and the
                task's state.
            step: Step of the checkpoint; None for the newest readable one.

        Raises:
            CheckpointError: There is no such step, or no checkpoint is readable.
        """

        def load(step: int, opened: _Opened) -> tuple[int, dict, Any, Any]:
            path = self.folder / str(step)
            ema, task_state = abstract(opened.config)
            restored = self._restored(path / "ema", ema)
            return step, opened.config, restored, self._task_state(path, task_state, opened)

        return self._newest(_INFERENCE, load, only=step)

    def snapshots(self, until: int) -> list[int]:
        """Steps of the checkpoints with readable power-function averages, in order.

        Unreadable ones are named in the log.

        Args:
            until: The last step that counts.
        """
        found = []
        for step in _steps(self.folder):
            path = self.folder / str(step)
            if step > until or not (path / "power_averages").exists():
                continue
            _, reason = _attempt(functools.partial(_open, path, ("config", "power_averages")))
            if reason:
                logging.warning("checkpoint %s is unreadable: %s", path, reason)
            else:
                found.append(step)
        return found

    def power_averages(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """The power-function averages of a checkpoint.

        Args:
            step: Step of the checkpoint.
            abstract: Shapes, dtypes and shardings.
        """
        # orbax has no item for a run that keeps none.
        item = self.folder / str(step) / "power_averages"
        return self._restored(item, abstract) if abstract else {}

    def config(self, step: int | None = None) -> dict:
        """The config in a checkpoint; by default the newest readable checkpoint.

        Raises:
            CheckpointError: There is no such step, or no checkpoint is readable.
        """
        return self._newest(("config",), lambda step, opened: opened.config, only=step)

    def _restored(self, item: epath.Path, abstract: Any) -> Any:
        """The arrays of an item; an earlier version may have written the blocks one by one."""

        def restored(abstract: Any) -> Any:
            return self._arrays.restore(item, args=ocp.args.StandardRestore(abstract))

        stacked = blocks.are_stacked(abstract)
        if stacked and blocks.are_separate(self._arrays.metadata(item).tree):
            shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
            stack = jax.jit(lambda tree: blocks.stack(tree, jnp.stack), out_shardings=shardings)
            return stack(restored(blocks.separate(abstract, _of_block)))
        return restored(abstract)

    def _task_state(self, path: epath.Path, abstract: Any, opened: _Opened) -> Any:
        restored = self._restored(path / "extra", _wrapped(abstract))
        if int(restored["version"]) >= _VERSION and not opened.checked:
            raise ValueError("its checksums are missing")
        return restored["extra"]

    def _newest(
        self,
        items: Iterable[str],
        load: Callable[[int, _Opened], T],
        *,
        only: int | None = None,
        move_aside: bool = False,
    ) -> T:
        """The result of `load` for the newest step that every process can load.

        A run may write and delete checkpoints meanwhile, so they are listed again before each try,
        by one process for all.
        """
        tried: dict[int, str] = {}

        def untried() -> list[int]:
            return [s for s in _steps(self.folder) if s not in tried and only in (None, s)]

        while steps := share.from_first(untried):
            step = steps[-1]
            path = self.folder / str(step)
            opened, reason = _attempt(functools.partial(_open, path, tuple(items)))
            if not reason:  # all processes read arrays, or none
                loaded, reason = _attempt(functools.partial(load, step, opened))
            if not reason:
                if move_aside:
                    self._move_aside(tried)
                return loaded
            tried[step] = reason
            if path.exists():
                logging.warning("checkpoint %s is unreadable: %s", path, reason)
        if not tried:
            raise _no_step(only, self.folder)
        newest = next(iter(tried))
        raise CheckpointError(
            f"no readable checkpoint in {self.folder} (tried {list(tried)}): "
            f"{self.folder / str(newest)}: {tried[newest]}"
        )

    def _move_aside(self, steps: Iterable[int]) -> None:
        if jax.process_index() == 0:
            for step in steps:
                aside = _free(self.folder / f"unreadable-{step}")
                with writing(aside):
                    (self.folder / str(step)).rename(aside)
                logging.warning("moved checkpoint %d to %s", step, aside)
        if steps:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("moved unreadable checkpoints")
            self._manager.reload()

    def _remove_partial(self) -> None:
        """Removes checkpoints whose writing was interrupted."""
        if jax.process_index():
            return
        with contextlib.suppress(OSError):  # if they stay, they do no harm
            for path in self.folder.iterdir():
                name = path.name.partition(ocp.utils.TMP_DIR_SUFFIX)[0]
                if _STEP.fullmatch(name) and ocp.utils.is_tmp_checkpoint(path):
                    path.rmtree()

    def _remove_empty(self) -> None:
        """Removes the folder if nothing was saved in it."""
        if jax.process_index() == 0 and not is_address(self.folder):
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(self.folder)


def newest_config(workdir: str) -> dict | None:
    """The config of a run's newest checkpoint with a readable config; None if there is none.

    This only reads, and unlike `Checkpoints` it never waits for other processes.

    Raises:
        CheckpointError: There is no permission to read a checkpoint.
    """
    folder = _folder_of(hub.local(workdir))
    tried: set[int] = set()
    while steps := [step for step in _steps(folder) if step not in tried]:
        path = folder / str(steps[-1])
        opened, _ = _attempt_here(functools.partial(_open, path, ("config",)))
        if opened:  # if not, restoring it will say what is wrong
            return opened.config
        tried.add(steps[-1])
    return None


def _folder_of(workdir: str | os.PathLike) -> epath.Path:
    """The folder of a run's checkpoints.

    Raises:
        CheckpointError: The workdir is where orbax has no access.
        BucketError: The workdir is in a bucket that cannot be read.
    """
    if os.fspath(workdir).startswith("s3://"):
        raise CheckpointError(
            f"{workdir}: checkpoints lie on file systems or in gs://, since orbax has no access to "
            "s3://: copy the run to this machine or back, or mount the bucket as a folder"
        )
    if buckets.is_bucket(workdir):
        buckets.check(os.fspath(workdir))
    return absolute(workdir) / FOLDER


def _steps(folder: epath.Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, in order; other names are ignored."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)]
    return sorted(int(path.name) for path in paths if ocp.utils.is_checkpoint_finalized(path))


def _open(path: epath.Path, items: tuple[str, ...]) -> _Opened:
    """Opens a checkpoint; raises an error if a file of the items differs from its checksum."""
    checked = checksums.compare(path, items)
    config = json.loads((path / "config" / "metadata").read_text())
    if not isinstance(config, dict):
        raise ValueError("its config is not a dict")
    return _Opened(config, checked)


def _attempt(read: Callable[[], T]) -> tuple[T | None, str]:
    """The result of `read`, or in one line the reason why not every process has one."""
    value, reason = _attempt_here(read)
    if _anywhere(bool(reason)):
        return None, reason or "another process cannot read its part"
    return value, ""


def _attempt_here(read: Callable[[], T]) -> tuple[T | None, str]:
    """The same for this process alone; raises errors that are not the checkpoint's fault."""
    try:
        return read(), ""
    except CheckpointError:
        raise
    except PermissionError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from error
    except Exception as error:  # orbax, tensorstore and grain raise errors of any type
        if isinstance(error, _PASSING_ERRORS) or _PASSING.search(str(error)):
            raise  # the checkpoint may be intact, so the run must not go on without it
        return None, (str(error).splitlines() or [type(error).__name__])[0]


def _free(path: epath.Path) -> epath.Path:
    """The path itself if nothing is there, or else the path with a number after it."""
    free, number = path, 1
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _no_step(step: int | None, folder: epath.Path) -> CheckpointError:
    steps = _steps(folder)
    if not steps:
        return CheckpointError(f"no checkpoint in {folder}: training has not written one yet")
    return CheckpointError(f"no step {step} in {folder}: there are {steps}")


def _anywhere(value: bool) -> bool:
    """Whether a value is true in any process."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.array(value)).any())


def _trained(state: TrainState) -> dict[str, Any]:
    """The parts of the state that only training needs; inference never opens them."""
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _of_block(leaf: jax.ShapeDtypeStruct, _: int) -> jax.ShapeDtypeStruct:
    """The shape and the sharding of a parameter of one block of a stack."""
    sharding = NamedSharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)


def _wrapped(task_state: Any) -> dict[str, Any]:
    """The content of the item `extra`; orbax needs at least one array in it, the version."""
    return {"extra": task_state, "version": np.array(_VERSION, np.int32)}


def _check_same_model(config: dict, stored: dict, path: epath.Path) -> None:
    found = changes(ConfigDict(config), ConfigDict(stored))
    if differing := [change.key for change in found if change.role == "fixed"]:
        raise CheckpointError(
            f"{path} was trained with another config.{', config.'.join(differing)}: "
            "give those values, or another workdir"
        )
