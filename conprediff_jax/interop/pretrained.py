"""A model for use: config, weights, first stage. What every format is read into and written from.

The folder of a `Pretrained` is one that training could have written, less what sampling does not
open: it holds no context decoder, no optimiser and no data state. `sample`, `evaluate` and the
Python API open either.

    <folder>/README.md                       model card
    <folder>/config.json                     the whole config, to be read
    <folder>/tokenizer.json                  where the model reads captions
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
from conprediff_jax.common.errors import UserError
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.runs import restore
from conprediff_jax.runs.checkpoint import FOLDER
from conprediff_jax.sampling.model import DiffusionModel
from conprediff_jax.weights import tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A denoiser with all that it takes to sample from it.

    Attributes:
        config: the whole config, of a denoising task.
        params: the denoiser's parameters, float32 NumPy arrays; with those of a text encoder that
            was trained along.
        frozen: the first stage's, as its `abstract` describes; with those of a text encoder that
            was not trained. Empty for pixels alone.
        step: training steps behind them; 0 where that is not known.
        origin: where they come from, for the model card.
    """

    config: ConfigDict
    params: Any
    frozen: dict[str, Any]
    step: int
    origin: str

    @classmethod
    def assembled(
        cls, config: ConfigDict, networks: Mapping[str, Any], *, step: int, origin: str
    ) -> "Pretrained":
        """The other way round of `networks`, all weights checked.

        Raises:
            UserError: weights are missing, left over or of other shapes than the config asks.
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
        """Parameters by what they are of: `denoiser`, `first_stage`, `text_encoder`, if any."""
        parts = {"denoiser": dict(self.params), "first_stage": dict(self.frozen)}
        for part in list(parts.values()):
            if "text_encoder" in part:
                parts["text_encoder"] = part.pop("text_encoder")
        return {name: part for name, part in parts.items() if part}

    @functools.cached_property
    def diffusion(self) -> DiffusionModel:
        """What the config describes."""
        return make_experiment(self.config).task.model

    def resampled(self, **settings: Any) -> "Pretrained":
        """The model with other settings of sampling in its config.

        Args:
            **settings: fields of the `sampling` section; None for those that stay.

        Raises:
            UserError: one does not fit the model.
        """
        spec = self.diffusion.sampling_with(**settings)
        config = ConfigDict(self.config.to_dict())
        with config.sampling.ignore_type():
            config.sampling.update(dataclasses.asdict(spec))
        return dataclasses.replace(self, config=config.lock())

    def check(self) -> None:
        """Raises UserError unless all weights are there, and of the shapes that the config asks."""
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


def open_folder(path: str, step: int | None = None) -> Pretrained:
    """Reads a workdir, or the folder of a model for use, onto the host.

    Args:
        path: the folder.
        step: which checkpoint; the newest readable one when None.

    Raises:
        UserError: there is none, or it is of a first stage.
    """
    step, config, params, extra = restore.restore(
        path, parallel.make_mesh(parallel.MeshSpec()), step
    )
    if "frozen" not in extra:
        raise UserError(f"{path} holds a first stage: there is no denoiser")
    params, frozen = jax.tree.map(np.asarray, (params, extra["frozen"]))
    return Pretrained(config=config, params=params, frozen=frozen, step=step, origin=str(path))


def write_folder(model: Pretrained, folder: pathlib.Path) -> None:
    """Writes the checkpoint of a model for use into an existing folder."""
    extra = {"frozen": model.frozen, "history": model.diffusion.process.init_history()}
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
                # As training writes it: see train.checkpoint.
                extra=ocp.args.StandardSave({"extra": extra, "version": np.array(1, np.int32)}),
                config=ocp.args.JsonSave(config),
            ),
        )


def write_config(model: Pretrained, folder: pathlib.Path, *, tokenizer: bool) -> None:
    """Writes `config.json`; and `tokenizer.json` where asked, of a model that reads captions."""
    text = json.dumps(json.loads(model.config.to_json()), indent=2)
    (folder / "config.json").write_text(text + "\n")
    if tokenizer and model.diffusion.text:
        (folder / "tokenizer.json").write_text(model.diffusion.tokenizer.to_json() + "\n")


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[pathlib.Path]:
    """A folder that appears under its name once all of it is written, or not at all.

    Raises:
        UserError: there is something of that name already.
    """
    out = pathlib.Path(path).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out}: exists already; name a folder that does not")
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
