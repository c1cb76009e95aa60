"""Checkpoints by orbax: asynchronous, atomic, and what each one holds.

A checkpoint is a folder of items that are read independently:

    <workdir>/checkpoints/<step>/
        ema      moving average of the denoiser, and
        extra    the task's own state, such as a frozen first stage: all that sampling opens
        train    step, parameters, optimiser state
        data     states of the data iterators, one file a process; see `batches`
        config   the run's config
"""

import contextlib
import re
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from conprediff_jax import config as config_lib
from conprediff_jax.errors import UserError
from conprediff_jax.files import absolute
from conprediff_jax.train.batches import Batches
from conprediff_jax.train.state import TrainState

FOLDER = "checkpoints"

# Of the machine or the storage, not of a checkpoint: names of status codes, HTTP's, and exceptions.
_PASSING = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED|UNAUTHENTICATED"
    r"|PERMISSION_DENIED)\b|\bHTTP\D{0,20}(429|5\d\d)\b"
)
_PASSING_ERRORS = (ConnectionError, TimeoutError, PermissionError, MemoryError)


class CheckpointError(UserError):
    """A checkpoint that is missing, unreadable, or of another model."""


class Checkpoints:
    """The checkpoints of a workdir. Use as a context manager: leaving it finishes writing.

    Args:
        workdir: of the run.
        keep: how many to keep; older ones are deleted.
        read_only: for programs that only look.
    """

    def __init__(self, workdir: str, *, keep: int | None = None, read_only: bool = False):
        self.folder = absolute(workdir) / FOLDER
        if read_only and not self.folder.is_dir():
            raise CheckpointError(
                f"no checkpoints in {self.folder}: a workdir is a folder that training wrote"
            )
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                save_interval_steps=0 if read_only else 1,
                max_to_keep=keep,
                create=not read_only,
                read_only=read_only,
            ),
            item_handlers={
                "ema": ocp.StandardCheckpointHandler(),
                "extra": ocp.StandardCheckpointHandler(),
                "train": ocp.StandardCheckpointHandler(),
                "data": grain.checkpoint.CheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
            },
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; one still being written does not count."""
        return max(self._steps(), default=None)

    def save(self, state: TrainState, data: Batches, config: dict) -> None:
        """Starts writing; the state may be donated as soon as this returns."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                ema=ocp.args.StandardSave(state.ema),
                extra=ocp.args.StandardSave(_wrapped(state.extra)),
                train=ocp.args.StandardSave(_trained(state)),
                data=grain.checkpoint.CheckpointSave(data),
                config=ocp.args.JsonSave(config),
            ),
        )

    def wait(self) -> None:
        """Waits until what was saved is on disk."""
        self._manager.wait_until_finished()

    def restore(self, abstract: TrainState, data: Batches, config: dict) -> TrainState | None:
        """The newest readable state, and `data` set to where it was; None if there is none.

        It may have been written by other processes, on another mesh. Unreadable checkpoints are
        named in the log and moved aside, out of the way of new ones.

        Raises:
            CheckpointError: the checkpoint is of another model, or none is readable.
        """

        def load(step: int) -> TrainState:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    ema=ocp.args.StandardRestore(abstract.ema),
                    extra=ocp.args.StandardRestore(_wrapped(abstract.extra)),
                    train=ocp.args.StandardRestore(_trained(abstract)),
                ),
            )
            data.restore(self.folder / str(step) / "data")
            return TrainState(
                ema=restored["ema"], extra=restored["extra"]["extra"], **restored["train"]
            )

        if not self._steps():
            return None
        return self._newest(load, config, move_aside=True)

    def restore_for_inference(
        self, abstract: Callable[[dict], tuple[Any, Any]], step: int | None = None
    ) -> tuple[int, dict, Any, Any]:
        """Step, config, moving average and own state of the task; the newest readable by default.

        Args:
            abstract: gives shapes and shardings of the moving average and the own state for a
                config.
            step: which checkpoint.

        Raises:
            CheckpointError: there is no such step, or nothing readable.
        """

        def load(step: int) -> tuple[int, dict, Any, Any]:
            config = self.config(step)
            ema, extra = abstract(config)
            args = ocp.args.Composite(
                ema=ocp.args.StandardRestore(ema),
                extra=ocp.args.StandardRestore(_wrapped(extra)),
            )
            restored = self._manager.restore(step, args=args)
            return step, config, restored["ema"], restored["extra"]["extra"]

        return self._newest(load, None, only=step)

    def config(self, step: int | None = None) -> dict:
        """The run's config that a checkpoint was written with, by default the newest.

        Raises:
            CheckpointError: there is no such step, or none at all.
        """
        steps = self._steps()
        if not steps or step not in (None, *steps):
            raise _no_step(step, self.folder, steps)
        step = steps[-1] if step is None else step
        args = ocp.args.Composite(config=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["config"]

    def _steps(self) -> list[int]:
        return sorted(ocp.utils.checkpoint_steps(self.folder))

    def _newest(
        self,
        load: Callable[[int], Any],
        config: dict | None,
        *,
        only: int | None = None,
        move_aside: bool = False,
    ) -> Any:
        """`load` of the newest step for which it works, in every process."""
        steps = self._steps()
        if only is not None:
            if only not in steps:
                raise _no_step(only, self.folder, steps)
            steps = [only]
        unreadable, reason = [], ""
        for step in reversed(steps):
            reason = ""
            try:
                if config is not None:
                    _check_same_model(config, self.config(step), self.folder / str(step))
                loaded = load(step)
            except CheckpointError:
                raise
            except Exception as error:  # orbax, tensorstore and grain raise what they like
                if isinstance(error, _PASSING_ERRORS) or _PASSING.search(str(error)):
                    raise  # the checkpoint may be whole: to be tried again, and not without it
                reason = (str(error).splitlines() or [type(error).__name__])[0]
            if _anywhere(bool(reason)):
                reason = reason or "another process cannot read its part"
                logging.warning("checkpoint %s is unreadable: %s", self.folder / str(step), reason)
                unreadable.append(step)
                continue
            if move_aside:
                self._move_aside(unreadable)
            return loaded
        raise CheckpointError(
            f"no readable checkpoint in {self.folder} (tried {steps[::-1]}): {reason}"
        )

    def _move_aside(self, steps: list[int]) -> None:
        for step in steps:
            aside = self.folder / f"unreadable-{step}"
            if jax.process_index() == 0:
                (self.folder / str(step)).rename(aside)
            logging.warning("moved checkpoint %d to %s", step, aside)
        if steps:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("moved unreadable checkpoints")
            self._manager.reload()


def newest_config(workdir: str) -> dict | None:
    """The config of a run's newest checkpoint that has a readable one; None where there is none.

    Only looks, and unlike `Checkpoints` never waits for other processes.
    """
    folder = absolute(workdir) / FOLDER
    if not folder.is_dir():
        return None
    for step in sorted(ocp.utils.checkpoint_steps(folder), reverse=True):
        with contextlib.suppress(Exception):  # whoever restores it will say what is wrong
            return ocp.JsonCheckpointHandler().restore(folder / str(step) / "config")
    return None


def _no_step(step: int | None, folder: epath.Path, steps: list[int]) -> CheckpointError:
    if not steps:
        return CheckpointError(f"no checkpoint in {folder}: training has not written one yet")
    return CheckpointError(f"no step {step} in {folder}: there are {steps}")


def _anywhere(value: bool) -> bool:
    """Whether it is true in some process."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.array(value)).any())


def _trained(state: TrainState) -> dict[str, Any]:
    """What training alone needs, and inference never opens."""
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _wrapped(extra: Any) -> dict[str, Any]:
    """Orbax wants a tree with an array in it, which an empty one is not."""
    return {"extra": extra, "version": np.array(1, np.int32)}


def _check_same_model(config: dict, stored: dict, path: epath.Path) -> None:
    differing = config_lib.differing_keys(config, stored)
    if differing:
        raise CheckpointError(
            f"{path} was trained with another config.{', config.'.join(differing)}: "
            "give those values, or another workdir"
        )
