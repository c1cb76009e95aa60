"""A run that starts from a trained model.

It takes the denoiser and the first stage of the model. The context decoder, the optimiser, the data
and the step begin anew.
"""

from typing import Any

import jax
from absl import logging

from conprediff_jax import parallel
from conprediff_jax.common.errors import UserError
from conprediff_jax.runs.restore import load
from conprediff_jax.sampling.model import TrainedModel, check_same
from conprediff_jax.tasks.denoising import Denoising
from conprediff_jax.tasks.state import TrainState
from conprediff_jax.tasks.task import Task


def start_from(path: str, state: TrainState, task: Task) -> TrainState:
    """A fresh state with the denoiser and the first stage of a trained model.

    Args:
        path: Workdir of a training run, or a folder for inference.
        state: The state that `init_state` returns.
        task: The task to be trained.

    Raises:
        UserError: The model differs from the config's; the message names the fields and their
            values on both sides.
    """
    where = f"config.train.init_from is {path}"
    if not isinstance(task, Denoising):
        raise UserError(f"{where}: only a denoiser can start from a denoiser")
    opened = load(path, parallel.make_mesh(parallel.MeshSpec()))
    theirs, ours = opened.model, task.model
    for part in ("first_stage", "process", "text", "denoiser"):
        check_same(f"{where}: its {part}", getattr(theirs, part), getattr(ours, part))
    if theirs.point_shape != ours.point_shape:
        raise UserError(f"{where}: points of {theirs.point_shape} there, {ours.point_shape} here")
    logging.info("starting from step %d of %s, with a fresh context decoder", opened.step, path)
    if ours.text and ours.text.has_fixed_weights != theirs.text.has_fixed_weights:
        opened = _with_text_encoder_moved(opened)
    params = _placed(opened.params, state.params[task.averaged])
    return state.replace(
        params=state.params | {task.averaged: params},
        ema=_placed(opened.params, state.ema),
        task_state=state.task_state
        | {"frozen": _placed(opened.frozen, state.task_state["frozen"])},
    )


def _with_text_encoder_moved(opened: TrainedModel) -> TrainedModel:
    """The model with its text encoder moved from frozen to trained parameters, or back."""
    params, frozen = dict(opened.params), dict(opened.frozen)
    there, here = (frozen, params) if opened.model.text.has_fixed_weights else (params, frozen)
    here["text_encoder"] = there.pop("text_encoder")
    return opened._replace(params=params, frozen=frozen)


def _placed(tree: Any, like: Any) -> Any:
    """Copies of arrays with the shardings of other arrays."""
    return jax.tree.map(
        lambda leaf, place: jax.device_put(leaf, place.sharding, may_alias=False), tree, like
    )
