"""The main task: a diffusion model with terms such as the prediction of every point's context.

    L = mean_batch r_t (L_denoise(x_0, t) + sum_k f_k(step) L_k)                            (1)

with r_t = `Times.weight`, which is 1 unless times are drawn by their losses, L_k the terms
(`objectives`) with their own weights, and f_k their rise and fall during training
(`context.Weighting`). Points x_0 are pixels, latents or tokens. Without terms, as with
`context.weight = 0`, the program is that of the plain diffusion model.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from conprediff_jax.common import random
from conprediff_jax.context.weighting import average
from conprediff_jax.data import Tokenizer
from conprediff_jax.diffusion.process import Times
from conprediff_jax.models.denoiser import Denoised
from conprediff_jax.objectives import ContextTerm, Seen, Term
from conprediff_jax.sampling.generate import make_preview
from conprediff_jax.sampling.model import Condition, DiffusionModel
from conprediff_jax.tasks.task import Batch, Metrics, Step, accumulate

CONTEXT = "context"  # the name of the term that `config.context` describes

# Scalars by the names of the losses: the denoising loss and the terms.
Losses = dict[str, Float[Array, ""]]
DENOISE = "denoise"
_OTHERS = "all other terms"


class Keys(NamedTuple):
    """One key per example for every random stream of a step."""

    time: Key[Array, "batch"]
    noise: Key[Array, "batch"]
    dropout: Key[Array, "batch"]
    condition: Key[Array, "batch"]
    terms: dict[str, Key[Array, "batch"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoising:
    """A `Task` that trains a diffusion model, with or without context prediction.

    The task's state is a dict of `frozen`, the model's parameters that are not trained, `history`,
    the process's statistics of past losses, and `terms`, the states of the terms that have one.

    Attributes:
        seed: Seed of all random streams.
        model: What is trained.
        terms: The terms of the loss by name; empty for the plain diffusion model.
        microbatches: Number of parts that a batch is computed in.
        latents: Folder of latents encoded ahead of time, in which case batches hold `latent` and
            not `image`; empty to encode on the fly.
        encoded_text: Whether captions were encoded ahead of time, into the same folder, in which
            case batches hold `encoded` and not `text`.
    """

    seed: int
    model: DiffusionModel
    terms: Mapping[str, Term]
    microbatches: int
    latents: str = ""
    encoded_text: bool = False

    averaged = "denoiser"

    @property
    def context(self) -> ContextTerm | None:
        """The context term of `config.context`; None if its weight is 0."""
        return self.terms.get(CONTEXT)

    @property
    def taps(self) -> tuple[str, ...]:
        """The names of the features that the terms read, each once."""
        return tuple(dict.fromkeys(name for term in self.terms.values() for name in term.taps))

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
        """Images or their latents, what the denoiser is told, and features that terms read."""
        keys = ["latent" if self.latents else "image"]
        if self.model.text:
            keys.append("encoded" if self.encoded_text else "text")
        elif self.num_classes:
            keys.append("label")
        return (*keys, "features") if self.features_shape else tuple(keys)

    @property
    def features_shape(self) -> tuple[int, ...]:
        """The shape of the features of an encoder that terms read; empty if none does."""
        shapes = [term.shape for term in self.terms.values() if term.reads_encoded]
        return shapes[0] if shapes else ()

    def init(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Initial parameters `{'denoiser': ..., 'context': ..., ...}`, and the task's state.

        The denoiser's parameters do not depend on the terms; those of a term are under its name.
        The frozen parameters are zeros until the trainer has loaded them.
        """
        denoiser, frozen = self.model.init(self.seed)
        params = {"denoiser": denoiser}
        if self.terms:
            shapes = self._shapes(denoiser, frozen)
            for name, term in self.terms.items():
                key = random.stream(self.seed, f"init/{_stream(name)}")
                if found := term.init_params(key, shapes):
                    params[name] = found
        return params, self.state(frozen)

    def state(self, frozen: dict[str, Any]) -> dict[str, Any]:
        """The task's state before the first step, given the parameters that are not trained."""
        state = {"frozen": frozen, "history": self.model.process.init_history()}
        terms = {name: term.init_state() for name, term in self.terms.items()}
        terms = {name: found for name, found in terms.items() if found}
        return state | {"terms": terms} if terms else state

    def _shapes(self, denoiser: Any, frozen: Any) -> Seen:
        """The shapes of what terms see of one example."""
        x, t, condition = self.model.example()

        def taps(params: Any) -> dict[str, Array]:
            denoised = self.model.denoise(params, x, t, condition, taps=self.taps)
            return {name: denoised.tap(name) for name in self.taps}

        return Seen(
            taps=jax.eval_shape(taps, denoiser),
            points=jax.eval_shape(self.model.first_stage.vectors, frozen, x),
            x_t=x,
            t=t,
        )

    def step(
        self, params: dict[str, Any], task_state: Any, batch: Batch, step: Int[Array, ""]
    ) -> Step:
        """The gradient of (1) over the whole batch, and the terms of (1) as metrics."""
        indices = jnp.arange(len(batch[self.batch_keys[0]]))

        def keys_of(name: str) -> Key[Array, "batch"]:
            stream = random.stream(self.seed, f"train/{name}", step)
            return random.example_keys(stream, indices)

        keys = Keys(
            *(keys_of(name) for name in Keys._fields[:-1]),
            terms={name: keys_of(_stream(name)) for name in self.terms},
        )
        # Times are drawn for the whole batch before it is split: the history needs all losses.
        times = self.model.process.sample_time(keys.time, task_state["history"])
        states = task_state.get("terms", {})
        factors = {name: self._factors(name, step, states) for name in self.terms}
        losses_of = functools.partial(self._losses, frozen=task_state["frozen"], factors=factors)
        arguments = (losses_of, params, batch, keys, times)
        if states:
            means, losses, states = self._measured(step, states, *arguments)
            task_state = task_state | {"terms": states}
            means[1].update({f"cosine/{name}": average(state) for name, state in states.items()})
        else:
            means, losses = self._gradient(*arguments)
        history = self.model.process.remember(task_state["history"], times.t, losses)
        return Step(*means, task_state | {"history": history})

    def _factors(self, name: str, step: Int[Array, ""], states: Any) -> "_Factors":
        term = self.terms[name]
        return _Factors(term.warmup(step), term.falling(step, states.get(name, {})))

    def _gradient(
        self, losses_of: Callable, params: Any, *batched: Any
    ) -> tuple[tuple[Any, Metrics], Array]:
        """The gradient of (1) and metrics, means over the batch; and L_denoise of every example."""

        def loss(params: Any, *batched: Any) -> tuple[Array, tuple[Metrics, Array]]:
            losses, aux = losses_of(params, *batched)
            return _total(losses), aux

        def grad(params: Any, *batched: Any) -> tuple[tuple[Any, Metrics], Array]:
            grads, (metrics, losses) = jax.grad(loss, has_aux=True)(params, *batched)
            return (grads, metrics), losses

        return accumulate(grad, params, self.microbatches, *batched)

    def _measured(
        self, step: Int[Array, ""], states: Any, losses_of: Callable, params: Any, *batched: Any
    ) -> tuple[tuple[Any, Metrics], Array, Any]:
        """As `_gradient`, and the states of the terms after measuring cosines where they are due.

        A step that measures goes backwards once for every such term, once for all other losses.
        """

        def grads_of(params: Any, *batched: Any) -> tuple[tuple[Any, Metrics], Array]:
            def parts(params: Any) -> tuple[Losses, tuple[Metrics, Array]]:
                losses, aux = losses_of(params, *batched)
                apart = {name: losses.pop(name) for name in (DENOISE, *states)}
                return apart | ({_OTHERS: _total(losses)} if losses else {}), aux

            losses, backwards, (metrics, every) = jax.vjp(parts, params, has_aux=True)
            grads = {
                name: backwards({other: jnp.float32(other == name) for other in losses})[0]
                for name in losses
            }
            return (grads, metrics), every

        def measure() -> tuple[Any, Array, Losses]:
            (grads, metrics), every = accumulate(grads_of, params, self.microbatches, *batched)
            cosines = {
                name: shared_cosine(grads[name]["denoiser"], grads[DENOISE]["denoiser"])
                for name in states
            }
            total = functools.reduce(functools.partial(jax.tree.map, jnp.add), grads.values())
            return (total, metrics), every, cosines

        def plain() -> tuple[Any, Array, Losses]:
            means, every = self._gradient(losses_of, params, *batched)
            return means, every, {name: jnp.zeros(()) for name in states}

        due = [self.terms[name].measures(step, state) for name, state in states.items()]
        means, every, cosines = jax.lax.cond(jnp.stack(due).any(), measure, plain)
        states = {
            name: self.terms[name].remember(state, step, cosines[name])
            for name, state in states.items()
        }
        return means, every, states

    def _losses(
        self,
        params: dict[str, Any],
        batch: Batch,
        keys: Keys,
        times: Times,
        *,
        frozen: dict[str, Any],
        factors: dict[str, "_Factors"],
    ) -> tuple[Losses, tuple[Metrics, Float[Array, "batch"]]]:
        """The summands of (1) on one (micro)batch, metrics, and L_denoise of every example."""
        model, (t, weight) = self.model, times
        if self.latents:
            x_0 = frozen["scale"] * batch["latent"]
        else:
            with jax.named_scope("first_stage"):
                x_0 = model.first_stage.encode(frozen, batch["image"])
        x_t, noise = model.process.corrupt(keys.noise, x_0, t)
        with jax.named_scope("denoiser"):
            condition, dropped = self._condition(params["denoiser"], frozen, batch, keys.condition)

        def denoise(x: Array, taps: tuple[str, ...] = ()) -> Denoised:
            with jax.named_scope("denoiser"):
                return model.denoise(
                    params["denoiser"],
                    x,
                    t,
                    condition,
                    unconditional=dropped,
                    rng=keys.dropout[0],
                    taps=taps,
                )

        def denoising_loss(output: Array) -> Float[Array, "batch"]:
            return model.process.loss(output, x_0, x_t, noise, t)

        denoised = denoise(x_t, self.taps)
        every = denoising_loss(denoised.output)
        losses = {DENOISE: (weight * every).mean()}
        if not self.terms:
            return losses, (_named(losses), every)

        def vectors(points: Array) -> Array:
            with jax.named_scope("context_prediction"):
                return model.first_stage.vectors(frozen, points)

        seen = Seen(
            taps={name: denoised.tap(name) for name in self.taps},
            points=vectors(x_0),
            x_t=x_t,
            t=t,
            encoded=batch.get("features"),
            estimate=lambda: vectors(model.process.predict_x0(denoised.output, x_t, t)),
            denoising_loss=lambda x: denoising_loss(denoise(x).output),
        )
        metrics = {}
        for name in self.terms:
            value, said = self._evaluate(name, params, seen, keys, weight, factors[name])
            losses[name] = value
            prefix = "" if name == CONTEXT else f"{name}/"
            metrics |= {f"{prefix}{key}": column for key, column in said.items()}
        return losses, (_named(losses) | metrics, every)

    def _evaluate(
        self, name: str, params: Any, seen: Seen, keys: Keys, weight: Array, factors: "_Factors"
    ) -> tuple[Float[Array, ""], Metrics]:
        """The summand of a term in (1), and its metrics; both 0 at no cost once it has stopped."""
        term = self.terms[name]

        def compute() -> tuple[Array, Metrics]:
            with jax.named_scope(f"{name}_prediction" if name == CONTEXT else name):
                there = dataclasses.replace(seen, rngs=keys.terms[name])
                weighted, metrics = term.evaluate(params.get(name, {}), there)
                return (weight * weighted).mean(), metrics

        if not term.may_stop:
            value, metrics = compute()
            return factors.warmup * value, metrics
        shapes = jax.eval_shape(compute)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        value, metrics = jax.lax.cond(factors.falling > 0, compute, lambda: zeros)
        return factors.warmup * factors.falling * value, metrics

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
        said = [self.model.describe(), "no context prediction"]
        if self.context:
            said[1] = f"context strides {self.context.strides}, {self.context.transport}"
        said += [name for name in self.terms if name != CONTEXT]
        return ", ".join(said)


class _Factors(NamedTuple):
    """The factors of a term at a step: f of equation (1) is their product."""

    warmup: Float[Array, ""]
    falling: Float[Array, ""]


def shared_cosine(term: Any, denoising: Any) -> Float[Array, ""]:
    """The cosine between two gradients over the parameters that the first one reaches.

    Args:
        term: The gradient of a term, which is exactly 0 where it does not reach.
        denoising: The gradient of the denoising loss, in the same shapes.

    Returns:
        The cosine; 0 if a gradient is 0.
    """
    shared = jax.tree.map(lambda g, d: jnp.where(g != 0, d, 0), term, denoising)
    product = optax.tree.vdot(term, shared)
    norms = optax.global_norm(term) * optax.global_norm(shared)
    return product / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)


def _stream(name: str) -> str:
    """The name of a term's random stream."""
    return name if name == CONTEXT else f"terms/{name}"


def _named(losses: Losses) -> Metrics:
    """The metrics of the losses and their sum."""
    every = {f"loss/{name}": value for name, value in losses.items()}
    return {"loss": _total(losses), **every}


def _total(losses: Losses) -> Float[Array, ""]:
    return functools.reduce(operator.add, losses.values())
