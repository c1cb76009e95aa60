"""Opening what training has written, for use."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from conprediff_jax import parallel
from conprediff_jax.common.errors import UserError
from conprediff_jax.config.experiment import Experiment, make_experiment
from conprediff_jax.config.vocabulary import _lacking_vocabulary, _with
from conprediff_jax.data import holes as holes_lib
from conprediff_jax.data.holes import Picture
from conprediff_jax.runs.checkpoint import Checkpoints, newest_config
from conprediff_jax.tasks.denoising import Denoising


class Trained(NamedTuple):
    """A trained denoiser.

    Attributes:
        task: what its config describes.
        params: moving average of the denoiser's parameters; the context decoder's are not loaded.
        frozen: the first stage's parameters, where it has any.
        step: of the checkpoint.
    """

    task: Denoising
    params: Any
    frozen: Any
    step: int


def load(workdir: str, mesh: Mesh, step: int | None = None) -> Trained:
    """Loads a workdir's moving average onto a mesh, whatever mesh it was trained on.

    Args:
        workdir: of a training run.
        mesh: where the parameters go, replicated.
        step: which checkpoint; the newest readable one when None.

    Raises:
        CheckpointError: the workdir holds no such checkpoint, or nothing readable.
    """
    step, config, params, extra = restore(workdir, mesh, step)
    return Trained(make_experiment(config).task, params, extra.get("frozen"), step)


def restore(
    workdir: str, mesh: Mesh, step: int | None = None
) -> tuple[int, ConfigDict, Any, dict[str, Any]]:
    """Step, config, moving average and own state of a checkpoint; see `load`."""

    def abstract(config: dict) -> tuple[Any, Any]:
        task = make_experiment(ConfigDict(config)).task
        params, extra = jax.eval_shape(task.init)
        sharding = parallel.replicated(mesh)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            (params[task.averaged], extra),
        )

    with Checkpoints(workdir, read_only=True) as checkpoints:
        step, config, params, extra = checkpoints.restore_for_inference(abstract, step)
    return step, ConfigDict(config), params, extra


def load_denoiser(path: str, mesh: Mesh, step: int | None = None, *, flag: str = "") -> Trained:
    """As `load`, of a denoiser and nothing else.

    Args:
        path: see `load`.
        mesh: see `load`.
        step: see `load`.
        flag: what a message puts before the path, such as `--workdir=`.

    Raises:
        CheckpointError: see `load`.
        UserError: it holds a first stage.
    """
    trained = load(path, mesh, step)
    _check_denoiser(trained.task, path, flag)
    return trained


def check_denoisers(paths: Iterable[str], step: int | None = None, *, flag: str = "") -> None:
    """Raises, for the first that has it, what `load_denoiser` would; parameters are not read."""
    for path in paths:
        _check_denoiser(load_experiment(path, step).task, path, flag)


def _check_denoiser(task: Any, path: str, flag: str) -> None:
    if not isinstance(task, Denoising):
        raise UserError(f"{flag}{path} holds a first stage: there is no denoiser")


def load_experiment(workdir: str, step: int | None = None) -> Experiment:
    """What a workdir's run was: its data and all else that its config describes.

    Args:
        workdir: of a training run.
        step: of the checkpoint whose config counts; the newest readable when None.

    Raises:
        CheckpointError: the workdir holds no checkpoint.
    """
    with Checkpoints(workdir, read_only=True) as checkpoints:
        config = checkpoints.config(step)
    return make_experiment(ConfigDict(config))


def read_pictures(
    images: str | None, workdir: str, step: int, *, split: str = "test", num: int | None = None
) -> list[Picture]:
    """The images of a folder or a data set, by default those of the data that a model was made of.

    Args:
        images: path of a folder, or name of a data set, which is read as the model's own.
        workdir: of the model.
        step: of its checkpoint.
        split: of a data set.
        num: how many, the first; all when None.

    Raises:
        UserError: there are none, or a file cannot be decoded.
    """
    if images and holes_lib.is_folder(images):
        return holes_lib.read_folder(images, num=num)
    spec = load_experiment(workdir, step).data
    spec = spec.of_images(name=images or spec.name, split=split, text=None)
    return holes_lib.read_data(spec, num=num)


def with_stored_vocabulary(config: ConfigDict, workdir: str) -> ConfigDict:
    """The config with the vocabulary of the run or model that it goes on from, where it has none.

    To learn it anew from data that have changed would give every token another meaning.

    Raises:
        ConfigError: a key does not fit.
    """
    if _lacking_vocabulary(config) is None:
        return config
    for path in filter(None, (workdir, config.train.init_from)):
        stored = newest_config(path) or {}
        if vocabulary := stored.get("text", {}).get("vocabulary"):
            return _with(config, vocabulary)
    return config
