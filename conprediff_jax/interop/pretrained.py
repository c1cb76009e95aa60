"""A model on the host: a config with its weights. All formats are read into it and written from it.

The folder of a `Pretrained` looks like the workdir of a run, without what sampling does not open:
it holds no context decoder, no optimiser and no place in the data. `sample`, `evaluate` and the
Python API open such a folder as they open a workdir.

    <folder>/README.md                       model card
    <folder>/config.json                     the whole config, for people to read
    <folder>/tokenizer.json                  the tokenizer of a model that reads captions
    <folder>/checkpoints/<step>/{ema, extra, config}
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from conprediff_jax import parallel
from conprediff_jax.common.errors import FieldError, UserError
from conprediff_jax.common.files import check_folder, is_address
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.runs import restore
from conprediff_jax.runs.checkpoint import FOLDER
from conprediff_jax.sampling.model import DiffusionModel
from conprediff_jax.weights import tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A denoiser with everything that sampling needs.

    Attributes:
        config: The whole config of a denoising task.
        params: The denoiser's parameters as float32 NumPy arrays. They include those of a text
            encoder that was trained with it.
        frozen: The parameters that were not trained: those of the first stage, as its `abstract`
            describes them, and of a text encoder that kept its weights. It may be empty.
        step: The number of training steps; 0 where it is not known.
        origin: The place that the weights come from, for messages and the model card.
        average: Which average of the trained parameters they are, in words; '' where it is not
            known.
    """

    config: ConfigDict
    params: Any
    frozen: dict[str, Any]
    step: int
    origin: str
    average: str = ""

    @classmethod
    def assembled(
        cls, config: ConfigDict, networks: Mapping[str, Any], *, step: int, origin: str
    ) -> "Pretrained":
        """Puts networks together, as `networks` takes them apart, and checks all weights.

        Args:
            config: The whole config of a denoising task.
            networks: The parameters of each network by its name; see `networks`.
            step: The number of training steps.
            origin: The place that the weights come from.

        Raises:
            UserError: Weights are missing, left over, or do not have the shapes that the config
                asks for.
        """
        parts = {"denoiser": {}, "first_stage": {}} | networks
        if "text_encoder" in parts:
            keeper = "first_stage" if config.text.get("weights") else "denoiser"
            parts[keeper] = parts[keeper] | {"text_encoder": parts["text_encoder"]}
        params, frozen = parts["denoiser"], parts["first_stage"]
        model = cls(config=config, params=params, frozen=frozen, step=step, origin=origin)
        model.check()
        return model

    @property
    def networks(self) -> dict[str, Any]:
        """The parameters of each network: `denoiser`, `first_stage` and `text_encoder`, if any."""
        parts = {"denoiser": dict(self.params), "first_stage": dict(self.frozen)}
        for part in list(parts.values()):
            if "text_encoder" in part:
                parts["text_encoder"] = part.pop("text_encoder")
        return {name: part for name, part in parts.items() if part}

    @functools.cached_property
    def diffusion(self) -> DiffusionModel:
        """The diffusion model that the config describes."""
        return make_experiment(self.config).task.model

    def resampled(self, **settings: Any) -> "Pretrained":
        """The model with other sampling settings in its config.

        Args:
            **settings: Fields of the `sampling` section. Those that are None do not change.

        Raises:
            UserError: A setting does not fit the model.
        """
        spec = self.diffusion.sampling_with(**settings)
        config = ConfigDict(self.config.to_dict())
        with config.sampling.ignore_type():
            config.sampling.update(dataclasses.asdict(spec))
        return dataclasses.replace(self, config=config.lock())

    def check(self) -> None:
        """Raises UserError unless all weights are there, in the shapes that the config asks for."""
        params, frozen = jax.eval_shape(self.diffusion.init, 0)
        for what, ours, theirs in (
            ("denoiser", params, self.params),
            ("frozen networks", frozen, self.frozen),
        ):
            shapes = [
                {"/".join(path): shape for path, shape in tensors.parameter_shapes(tree).items()}
                for tree in (ours, theirs)
            ]
            try:
                tensors.check_same(what, *shapes)
            except ValueError as error:
                raise UserError(f"{self.origin}: {error}") from error


def open_run(path: str, step: int | None = None, average: float | None = None) -> restore.Restored:
    """Opens a workdir of any task, or a folder that `write_folder` wrote.

    Args:
        path: The folder.
        step: The step of the checkpoint; None for the newest readable one.
        average: The relative deviation of a power-function average, see `restore.restore`; None for
            the moving average.

    Raises:
        UserError: There is no such checkpoint or average.
    """
    return restore.restore(path, parallel.make_mesh(parallel.MeshSpec()), step, average)


def open_folder(path: str, step: int | None = None, average: float | None = None) -> Pretrained:
    """Reads a workdir, or a folder that `write_folder` wrote, onto the host.

    Args:
        path: The folder.
        step: The step of the checkpoint; None for the newest readable one.
        average: The relative deviation of a power-function average, see `restore.restore`; None for
            the moving average.

    Raises:
        UserError: There is no such checkpoint or average, or the checkpoint holds a first stage and
            no denoiser.
    """
    return of_run(open_run(path, step, average), path)


def of_run(run: restore.Restored, path: str) -> Pretrained:
    """The model of an open run, on the host; see `open_folder`."""
    if "frozen" not in run.task_state:
        raise UserError(f"{path} holds a first stage: there is no denoiser")
    params, frozen = jax.tree.map(np.asarray, (run.params, run.task_state["frozen"]))
    return Pretrained(
        config=run.config,
        params=params,
        frozen=frozen,
        step=run.step,
        origin=str(path),
        average=run.average,
    )


def write_folder(model: Pretrained, folder: pathlib.Path) -> None:
    """Writes the checkpoint of a model into an existing folder."""
    task_state = {"frozen": model.frozen, "history": model.diffusion.process.init_history()}
    config = json.loads(model.config.to_json())
    handlers = {
        "ema": ocp.StandardCheckpointHandler(),
        "extra": ocp.StandardCheckpointHandler(),
        "config": ocp.JsonCheckpointHandler(),
    }
    checkpoints = (folder / FOLDER).resolve()
    with ocp.CheckpointManager(checkpoints, item_handlers=handlers) as manager:
        manager.save(
            model.step,
            args=ocp.args.Composite(
                ema=ocp.args.StandardSave(model.params),
                # Training writes the same layout: see runs/checkpoint.py.
                extra=ocp.args.StandardSave(
                    {"extra": task_state, "version": np.array(1, np.int32)}
                ),
                config=ocp.args.JsonSave(config),
            ),
        )


def write_config(model: Pretrained, folder: pathlib.Path, *, tokenizer: bool) -> None:
    """Writes `config.json` and, if asked to, the tokenizer of a model that reads captions."""
    text = json.dumps(json.loads(model.config.to_json()), indent=2)
    (folder / "config.json").write_text(text + "\n")
    if tokenizer and model.diffusion.text:
        (folder / "tokenizer.json").write_text(model.diffusion.tokenizer.to_json() + "\n")


def check_new(path: str) -> pathlib.Path:
    """Checks that a folder can be made, and returns its path.

    Raises:
        UserError: There is a file, or a folder that is not empty, of that name already; or nothing
            can be written there.
    """
    if is_address(path):
        check_folder(path, "out", local=True)
    out = pathlib.Path(path).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FieldError("out", f"is {out}, which exists already; name a folder that does not")
    check_folder(out, "out")
    return out


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[pathlib.Path]:
    """A folder that appears under its name once everything in it is written, or not at all.

    Raises:
        UserError: There is a file, or a folder that is not empty, of that name already.
    """
    out = check_new(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
