"""The main task: a diffusion model that also predicts the context of every point.

    L = mean_batch r_t (L_denoise(x_0, t) + w(step) * lambda_t * mean_i sum_s w_s W_2^2(i, s))   (1)

with r_t = `Times.weight`, which is 1 unless times are drawn by their losses. Points x_0 are pixels,
latents or tokens; what the decoder predicts are the vectors of neighbouring points. Source: arXiv
2401.02015, section 3. With `context.weight = 0` there is no context decoder and the program is that
of the plain diffusion model.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from conprediff_jax.common import random
from conprediff_jax.context import ContextPrediction
from conprediff_jax.data import Tokenizer
from conprediff_jax.diffusion.process import Times
from conprediff_jax.sampling.generate import make_preview
from conprediff_jax.sampling.model import Condition, DiffusionModel
from conprediff_jax.tasks.task import Batch, Metrics, Step, accumulate


class Keys(NamedTuple):
    """One key per example for every random stream of a step."""

    time: Key[Array, "batch"]
    noise: Key[Array, "batch"]
    context: Key[Array, "batch"]
    dropout: Key[Array, "batch"]
    condition: Key[Array, "batch"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoising:
    """A `Task` that trains a diffusion model, with or without context prediction.

    The task's state is a dict of `frozen`, the model's parameters that are not trained, and
    `history`, the process's statistics of past losses.

    Attributes:
        seed: Seed of all random streams.
        model: What is trained.
        context: The context term; None for the plain diffusion model.
        microbatches: Number of parts that a batch is computed in.
        latents: Folder of latents encoded ahead of time, in which case batches hold `latent` and
            not `image`; empty to encode on the fly.
        encoded_text: Whether captions were encoded ahead of time, into the same folder, in which
            case batches hold `encoded` and not `text`.
    """

    seed: int
    model: DiffusionModel
    context: ContextPrediction | None
    microbatches: int
    latents: str = ""
    encoded_text: bool = False

    averaged = "denoiser"

    @property
    def num_classes(self) -> int | None:
        """The number of classes; None when labels are not read."""
        return self.model.num_classes

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of captions; None when captions are not read."""
        return self.model.tokenizer

    @property
    def batch_keys(self) -> tuple[str, ...]:
        """Images or their latents, and the labels or captions that the denoiser reads."""
        source = "latent" if self.latents else "image"
        if self.model.text:
            return source, "encoded" if self.encoded_text else "text"
        return (source, "label") if self.num_classes else (source,)

    def init(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Initial parameters `{'denoiser': ..., 'context': ...}`, and the task's state.

        The denoiser's parameters do not depend on whether there is a context decoder. The frozen
        parameters are zeros until the trainer has loaded them.
        """
        denoiser, frozen = self.model.init(self.seed)
        params = {"denoiser": denoiser}
        if self.context:
            params["context"] = self._init_context(denoiser, frozen)
        return params, {"frozen": frozen, "history": self.model.process.init_history()}

    def _init_context(self, denoiser: Any, frozen: Any) -> Any:
        """Initial parameters of the context decoder, for the sizes of its inputs and outputs."""
        x, t, condition = self.model.example()
        vectors = jax.eval_shape(self.model.first_stage.vectors, frozen, x)
        h = vectors
        if self.context.source == "features":
            h = jax.eval_shape(
                lambda params: self.model.denoise(params, x, t, condition).features, denoiser
            )
        return self.context.init(
            random.stream(self.seed, "init/context"),
            features=h.shape[-1],
            channels=vectors.shape[-1],
            dimensions=vectors.ndim - 2,
        )

    def step(
        self, params: dict[str, Any], task_state: Any, batch: Batch, step: Int[Array, ""]
    ) -> Step:
        """The gradient of (1) over the whole batch, and the terms of (1) as metrics."""
        indices = jnp.arange(len(batch[self.batch_keys[0]]))
        streams = (random.stream(self.seed, f"train/{name}", step) for name in Keys._fields)
        keys = Keys(*(random.example_keys(stream, indices) for stream in streams))
        # Times are drawn for the whole batch before it is split: the history needs all losses.
        times = self.model.process.sample_time(keys.time, task_state["history"])

        def grad(params: Any, *arguments: Any) -> tuple[tuple[Any, Metrics], Array]:
            objective = jax.grad(self.objective, has_aux=True)
            grads, (metrics, losses) = objective(params, task_state["frozen"], *arguments, step)
            return (grads, metrics), losses

        means, losses = accumulate(grad, params, self.microbatches, batch, keys, times)
        history = self.model.process.remember(task_state["history"], times.t, losses)
        return Step(*means, task_state | {"history": history})

    def objective(
        self,
        params: dict[str, Any],
        frozen: dict[str, Any],
        batch: Batch,
        keys: Keys,
        times: Times,
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], tuple[Metrics, Float[Array, "batch"]]]:
        """Equation (1) on one (micro)batch, its terms, and L_denoise of every example."""
        model, (t, weight) = self.model, times
        if self.latents:
            x_0 = frozen["scale"] * batch["latent"]
        else:
            with jax.named_scope("first_stage"):
                x_0 = model.first_stage.encode(frozen, batch["image"])
        x_t, noise = model.process.corrupt(keys.noise, x_0, t)
        with jax.named_scope("denoiser"):
            condition, dropped = self._condition(params["denoiser"], frozen, batch, keys.condition)
            output, features = model.denoise(
                params["denoiser"], x_t, t, condition, unconditional=dropped, rng=keys.dropout[0]
            )
        losses = model.process.loss(output, x_0, x_t, noise, t)
        denoise = (weight * losses).mean()
        if self.context is None:
            return denoise, ({"loss": denoise, "loss/denoise": denoise}, losses)
        with jax.named_scope("context_prediction"):
            h = features
            if self.context.source == "prediction":
                h = model.first_stage.vectors(frozen, model.process.predict_x0(output, x_t, t))
            vectors = model.first_stage.vectors(frozen, x_0)
            weighted, distance = self.context.loss(params["context"], h, vectors, t, keys.context)
            context = (weight * weighted).mean()
        context = self.context.warmup(step) * context
        loss = denoise + context
        metrics = {"loss": loss, "loss/denoise": denoise, "loss/context": context}
        for stride, column in zip(self.context.strides, distance.T, strict=True):
            metrics[f"distance/stride_{stride}"] = column.mean()
        return loss, (metrics, losses)

    def _condition(
        self, params: Any, frozen: dict[str, Any], batch: Batch, rngs: Key[Array, "batch"]
    ) -> tuple[Condition, Bool[Array, "batch"] | None]:
        """The condition of a batch, and where the learned null replaces it (None: nowhere)."""
        model, label, text = self.model, None, None
        if model.num_classes:
            label = batch["label"]
        if self.encoded_text:
            text = batch["encoded"].astype(jnp.float32)
        elif model.text:
            text = model.encode_text(params, frozen, batch["text"])
        if not model.condition.dropout:
            return Condition(label=label, text=text), None
        dropped = jax.vmap(lambda rng: jax.random.bernoulli(rng, model.condition.dropout))(rngs)
        if model.condition.learned_null:
            return Condition(label=label, text=text), dropped
        empty = model.encode_text(params, frozen, model.text.empty)
        return Condition(text=jnp.where(dropped[:, None, None], empty, text)), None

    def preview(self, mesh: Mesh) -> Callable[[Any, Any], np.ndarray]:
        """A function that samples with the same seeds in every call, so that grids compare."""
        draw = make_preview(self.model, mesh, seed=self.seed)
        return lambda params, state: draw(params, state["frozen"])

    def describe(self) -> str:
        """One line for the log: the model, its points and its context prediction."""
        if self.context is None:
            return f"{self.model.describe()}, no context prediction"
        strides, transport = self.context.strides, self.context.transport
        return f"{self.model.describe()}, context strides {strides}, {transport}"
