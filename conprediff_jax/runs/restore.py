"""Opening checkpoints to use the models in them."""

import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from conprediff_jax import parallel
from conprediff_jax.common.errors import FieldError, UserError
from conprediff_jax.common.images import list_images
from conprediff_jax.config.experiment import Experiment, make_experiment
from conprediff_jax.data import holes as holes_lib
from conprediff_jax.data.holes import Picture
from conprediff_jax.runs.averages import power_average
from conprediff_jax.runs.checkpoint import Checkpoints
from conprediff_jax.sampling.autoguidance import guided_by
from conprediff_jax.sampling.model import DiffusionModel, TrainedModel
from conprediff_jax.tasks.denoising import Denoising
from conprediff_jax.tasks.task import Task


class Restored(NamedTuple):
    """The parts of a checkpoint that are needed to use its model, for any task.

    Attributes:
        step: Number of training steps.
        config: The run's config.
        task: The task that the config describes.
        params: Moving average of the parameters `params[task.averaged]`, or another average.
        task_state: The task's state.
        average: Which average they are, in words.
        class_names: Names of the classes by number; () if they are not known.
    """

    step: int
    config: ConfigDict
    task: Task
    params: Any
    task_state: Any
    average: str
    class_names: tuple[str, ...]


def restore(
    workdir: str, mesh: Mesh, step: int | None = None, average: float | None = None
) -> Restored:
    """Reads a checkpoint onto a mesh, whatever mesh it was trained on.

    Args:
        workdir: Workdir of a training run, or a folder for inference.
        mesh: The mesh on which the parameters are replicated.
        step: Step of the checkpoint; None for the newest readable one.
        average: Relative deviation of the power-function average that is read; see
            `tasks.power_averages`. None for the moving average.

    Raises:
        CheckpointError: The folder holds no such checkpoint, nothing readable, or no averages that
            this one can be made from.
        FieldError: There is no average of this relative deviation.
    """

    def abstract(config: dict) -> tuple[Any, Any]:
        task = make_experiment(ConfigDict(config)).task
        params, task_state = jax.eval_shape(task.init)
        sharding = parallel.replicated(mesh)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            (params[task.averaged], task_state),
        )

    with Checkpoints(workdir, read_only=True) as checkpoints:
        step, config, params, task_state = checkpoints.restore_for_inference(abstract, step)
        config = ConfigDict(config)
        experiment = make_experiment(config)
        name = plain_average(experiment.train.ema_decay)
        if average is not None:
            name = f"power function, relative deviation {average}"
            kept = experiment.train.power_averages
            params = power_average(checkpoints, kept, step, average, params)
    names = tuple(experiment.data.class_names)
    return Restored(step, config, experiment.task, params, task_state, name, names)


def load(
    workdir: str, mesh: Mesh, step: int | None = None, average: float | None = None
) -> TrainedModel:
    """The diffusion model of a run with an average of its parameters; see `restore`.

    Raises:
        CheckpointError: The folder holds no such checkpoint, no readable one, or no averages that
            this one can be made from.
        FieldError: There is no average of this relative deviation.
        UserError: The run trained a first stage.
    """
    restored = restore(workdir, mesh, step, average)
    return TrainedModel(
        model=_model_of(restored.task, workdir),
        params=restored.params,
        frozen=restored.task_state["frozen"],
        step=restored.step,
        average=restored.average,
        class_names=restored.class_names,
    )


def plain_average(decay: float) -> str:
    """The name, in records, of the moving average that every run keeps."""
    return f"exponential, decay {decay}"


def load_guided(
    workdir: str,
    mesh: Mesh,
    step: int | None = None,
    guide: tuple[str, int | None, float | None] | None = None,
    average: float | None = None,
) -> TrainedModel:
    """The diffusion model of a run, guided by that of another; see `load` and `autoguidance`.

    Args:
        workdir: As for `load`, of the model.
        mesh: As for `load`.
        step: As for `load`, of the model.
        guide: Workdir, step and average of the guide; None for a model without one.
        average: As for `load`, of the model.

    Raises:
        UserError: As for `load`, or the guide does not fit the model.
    """
    trained = load(workdir, mesh, step, average)
    if guide is None:
        return trained
    path, *which = guide
    try:
        worse = load(path, mesh, *which)
    except FieldError as error:
        raise UserError(f"the guide {path}: {error}") from error
    return guided_by(trained, worse, f"{path}, step {worse.step}, average {worse.average}")


def load_model(workdir: str, step: int | None = None) -> DiffusionModel:
    """The diffusion model of a run, without its parameters; raises the errors of `load`."""
    return _model_of(load_experiment(workdir, step).task, workdir)


def _model_of(task: Task, workdir: str) -> DiffusionModel:
    if not isinstance(task, Denoising):
        raise UserError(f"{workdir} holds a first stage: there is no denoiser")
    return task.model


def load_experiment(workdir: str, step: int | None = None) -> Experiment:
    """The experiment of a run: its data, and all else that its config describes.

    Args:
        workdir: Workdir of a training run.
        step: Step of the checkpoint whose config is read; None for the newest readable one.

    Raises:
        CheckpointError: The workdir holds no such checkpoint.
    """
    with Checkpoints(workdir, read_only=True) as checkpoints:
        config = checkpoints.config(step)
    return make_experiment(ConfigDict(config))


def read_pictures(
    images: str | None, workdir: str, step: int, *, split: str = "test", num: int | None = None
) -> list[Picture]:
    """The images of a folder or a data set, by default the data set that a model was trained on.

    Args:
        images: Path of a file or folder, or name of a data set. A data set is read with the
            settings of the model's own data.
        workdir: Workdir of the model.
        step: Step of its checkpoint.
        split: Split of the data set.
        num: Number of images, from the first on; None for all.

    Raises:
        UserError: There are no images, or a file cannot be decoded.
    """
    spec = load_experiment(workdir, step).data
    if images and holes_lib.are_files(images):
        return holes_lib.read_files(images, num=num, channels=spec.channels)
    spec = spec.of_images(name=images or spec.name, split=split, text=None)
    return holes_lib.read_data(spec, num=num)


def own_files(images: str | None, workdir: str, step: int, masks: str) -> Iterator[pathlib.Path]:
    """The files of images and masks that are read, and all other images in the same folders.

    Args:
        images: See `read_pictures`.
        workdir: See `read_pictures`.
        step: See `read_pictures`.
        masks: The masks, as `holes.cut` takes them.
    """
    for place in (images or load_experiment(workdir, step).data.name, masks):
        path = pathlib.Path(place).expanduser()
        if path.is_file():
            yield path
        elif holes_lib.are_files(place):
            yield from (path / name for name in list_images(path))
