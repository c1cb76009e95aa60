"""What a run reads that has to be there before it begins, and all of it that is missing."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from conprediff_jax import data
from conprediff_jax.common import hub
from conprediff_jax.common.errors import UserError
from conprediff_jax.config.experiment import Experiment, make_experiment
from conprediff_jax.data import Tokenizer, latents
from conprediff_jax.data.tfds import OPENMOJI
from conprediff_jax.models.first_stage import Autoencoded
from conprediff_jax.runs.checkpoint import newest_config
from conprediff_jax.runs.first_stage import check_there
from conprediff_jax.sampling.text import TextCondition
from conprediff_jax.tasks.denoising import Denoising
from conprediff_jax.tasks.first_stage import FirstStageTraining
from conprediff_jax.weights import transformers_text


class Need(NamedTuple):
    """Something that a run reads and cannot make itself.

    Attributes:
        key: The key of the config that names it.
        place: Its path or name, the value of the key.
        check: A function that raises UserError, with what to do, if it is not there.
        stored: Whether checkpoints hold it, so that a run that continues does not read it.
    """

    key: str
    place: str
    check: Callable[[], object]
    stored: bool = True


class MissingError(UserError):
    """Things are missing that a run reads; the message has a line for each."""


def check(
    config: ConfigDict, workdir: str | None, how: Mapping[str, str], *, encode: bool = False
) -> None:
    """Checks that everything is there that a config reads, before anything is built.

    Args:
        config: The config.
        workdir: The workdir of the run, which may hold checkpoints; None for no run.
        how: How to get what is missing, by its path or name; the header of a config file says it.
        encode: Whether the command makes the latents that the config names.

    Raises:
        MissingError: Things are missing; the message names all of them, and how to get each.
        ConfigError: A key of the config is wrong.
    """
    experiment = make_experiment(config)
    continues = bool(workdir and newest_config(workdir))
    lacking: dict[Need, UserError] = {}
    for need in needs_of(experiment):
        made = need.key == "config.data.latents" and encode
        if made or (need.stored and (continues or experiment.train.init_from)):
            continue
        try:
            need.check()
        except UserError as error:
            lacking[need] = error
    if not lacking:
        return
    (first, error), *more = lacking.items()
    if not more and first.place not in how:
        raise error
    lines = [f"{need.place} ({need.key}): {how.get(need.place, lacking[need])}" for need in lacking]
    if not more:
        raise MissingError(f"this config needs {lines[0]}")
    first_line = f"this config needs {len(lines)} things that are missing; get them in this order:"
    raise MissingError("\n  ".join([first_line, *lines, "then start this command again"]))


def needs_of(experiment: Experiment) -> Iterator[Need]:
    """Everything that a fresh run of an experiment reads, in the order in which it can be made."""
    spec, task = experiment.data, experiment.task
    if not spec.name.startswith(OPENMOJI) and not spec.download:
        yield Need("config.data.name", spec.name, lambda: _open_images(spec), stored=False)
    if isinstance(task, FirstStageTraining) and task.perceptual:
        for name in ("lpips_trunk", "lpips_heads"):
            path = getattr(task.loss, name)
            yield Need(f"config.loss.{name}", path, lambda path=path: _check_file(path))
    if not isinstance(task, Denoising):
        return
    first_stage, text = task.model.first_stage, task.model.text
    if isinstance(first_stage, Autoencoded):
        weights = first_stage.weights
        yield Need("config.first_stage.weights", weights, lambda: check_there(first_stage))
    if text and text.weights:
        yield Need("config.text.weights", text.weights, lambda: _check_text(text))
    if text and text.tokenizer and text.tokenizer != text.weights:
        yield Need("config.text.tokenizer", text.tokenizer, lambda: _read_tokenizer(text))
    if spec.latents:
        made = spec.latents
        yield Need("config.data.latents", made, lambda: latents.read_manifest(made), stored=False)


def _open_images(spec: data.DataSpec) -> None:
    """Opens the images, which a run does not read once their latents are there."""
    if spec.latents:
        with contextlib.suppress(UserError):
            latents.read_manifest(spec.latents)
            return
    data.open_data(spec.of_images())


def _check_text(text: TextCondition) -> None:
    """Checks that the frozen text encoder is there, and its tokenizer if it is beside it."""
    transformers_text.find(text.weights)
    if text.tokenizer == text.weights:
        _read_tokenizer(text)


def _read_tokenizer(text: TextCondition) -> None:
    Tokenizer.from_file(text.tokenizer, length=text.encoder.length)


def _check_file(path: str) -> None:
    if not pathlib.Path(hub.local(path)).expanduser().is_file():
        raise UserError("there is no such file")
