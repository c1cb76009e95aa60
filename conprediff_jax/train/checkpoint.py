"""Checkpoints by orbax: asynchronous, atomic, and what each one holds.

<workdir>/checkpoints/<step>/
    ema      moving average of the denoiser: all that sampling opens
    train    everything else: step, parameters, optimiser state
    data     state of the grain iterator, one file a process
    config   the run's config
"""

from collections.abc import Callable
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from conprediff_jax import config as config_lib
from conprediff_jax.errors import UserError
from conprediff_jax.train.state import TrainState

FOLDER = "checkpoints"


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
        self.folder = epath.Path(workdir).resolve() / FOLDER
        if read_only and not self.folder.is_dir():
            raise CheckpointError(
                f"no checkpoints in {self.folder}: --workdir is a folder that training wrote"
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

    def save(self, state: TrainState, data: grain.DatasetIterator, config: dict) -> None:
        """Starts writing; the state may be donated as soon as this returns."""
        train = _all_but_average(state)
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                ema=ocp.args.StandardSave(state.ema),
                train=ocp.args.StandardSave(train),
                data=grain.checkpoint.CheckpointSave(data),
                config=ocp.args.JsonSave(config),
            ),
        )

    def wait(self) -> None:
        """Waits until what was saved is on disk."""
        self._manager.wait_until_finished()

    def restore(
        self, abstract: TrainState, data: grain.DatasetIterator, config: dict
    ) -> TrainState | None:
        """The newest readable state, and `data` set to where it was; None if there is none.

        Unreadable checkpoints are named in the log and moved aside, out of the way of new ones.

        Raises:
            CheckpointError: the checkpoint is of another model, or none is readable.
        """

        def load(step: int) -> TrainState:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    ema=ocp.args.StandardRestore(abstract.ema),
                    train=ocp.args.StandardRestore(_all_but_average(abstract)),
                    data=grain.checkpoint.CheckpointRestore(data),
                ),
            )
            return TrainState(ema=restored["ema"], **restored["train"])

        if not self._steps():
            return None
        return self._newest(load, config, move_aside=True)

    def restore_ema(
        self, abstract: Callable[[dict], Any], step: int | None = None
    ) -> tuple[int, dict, Any]:
        """Step, config and moving average, of one step or of the newest readable checkpoint.

        Args:
            abstract: gives shapes and shardings of the moving average for a config.
            step: which checkpoint.

        Raises:
            CheckpointError: there is no such step, or nothing readable.
        """

        def load(step: int) -> tuple[int, dict, Any]:
            config = self._config(step)
            args = ocp.args.Composite(ema=ocp.args.StandardRestore(abstract(config)))
            return step, config, self._manager.restore(step, args=args)["ema"]

        return self._newest(load, None, only=step)

    def _config(self, step: int) -> dict:
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
        """`load` of the newest step for which it works."""
        steps = self._steps()
        if only is not None:
            if only not in steps:
                raise CheckpointError(f"no step {only} in {self.folder}: there are {steps}")
            steps = [only]
        unreadable = []
        for step in reversed(steps):
            try:
                if config is not None:
                    _check_same_model(config, self._config(step), self.folder / str(step))
                loaded = load(step)
            except CheckpointError:
                raise
            except Exception as error:  # orbax, tensorstore and grain raise what they like
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                logging.warning("checkpoint %s is unreadable: %s", self.folder / str(step), reason)
                unreadable.append(step)
                continue
            if move_aside:
                self._move_aside(unreadable)
            return loaded
        raise CheckpointError(f"no readable checkpoint in {self.folder} (tried {steps[::-1]})")

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


def _all_but_average(state: TrainState) -> dict[str, Any]:
    return {name: value for name, value in vars(state).items() if name != "ema"}


def _check_same_model(config: dict, stored: dict, path: epath.Path) -> None:
    differing = config_lib.differing_keys(config, stored)
    if differing:
        raise CheckpointError(
            f"{path} was trained with another config.{', config.'.join(differing)}: "
            "give those values, or another --workdir"
        )
