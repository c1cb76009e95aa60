"""The main task: a diffusion model that also predicts the context of every point.

    L = mean_batch r_t (L_denoise(x_0, t) + w(step) * lambda_t * mean_i sum_s w_s W_2^2(i, s))   (1)

with r_t = 1 / (T p(t)) for times drawn with probability p(t). Points x_0 are pixels, latents or
tokens; what the decoder predicts are the vectors of neighbouring points. Source: arXiv 2401.02015,
section 3. With `context.weight = 0` there is no context decoder and the program is that of the
plain diffusion model.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from conprediff_jax.common import random
from conprediff_jax.common.errors import FieldError
from conprediff_jax.context import ContextPrediction
from conprediff_jax.data import Tokenizer, encoders
from conprediff_jax.data import latents as latents_lib
from conprediff_jax.diffusion.guidance import NO_GUIDANCE, Guidance
from conprediff_jax.diffusion.process import Process, Times
from conprediff_jax.models.first_stage import FirstStage, Pixels
from conprediff_jax.models.layers import Denoised
from conprediff_jax.models.transformer import TokenTransformer
from conprediff_jax.models.unet import UNet
from conprediff_jax.sampling.generate import generate_batches, make_generate
from conprediff_jax.sampling.spec import SamplingSpec
from conprediff_jax.sampling.text import TextCondition
from conprediff_jax.tasks.spec import ConditionSpec
from conprediff_jax.tasks.task import Batch, Metrics, Step, accumulate
from conprediff_jax.train import frozen as frozen_lib


class Keys(NamedTuple):
    """One key per example for every random stream of a step."""

    time: Key[Array, "batch"]
    noise: Key[Array, "batch"]
    context: Key[Array, "batch"]
    dropout: Key[Array, "batch"]
    condition: Key[Array, "batch"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoising:
    """Diffusion on the points of a first stage, with or without context prediction; a `Task`.

    Its own state holds `frozen`, the first stage's parameters, and `history`, what the process
    remembers of past losses.

    Attributes:
        seed: of every random stream.
        first_stage: between images and points.
        process: what is done to the points and asked of the denoiser.
        denoiser: the network.
        context: None for the plain diffusion model.
        sampling: how the sample grids are made.
        microbatches: parts that a batch is computed in.
        point_shape: of the points: (rows, columns, channels), or (rows, columns) of tokens.
        condition: what is done to labels and captions in training.
        text: captions as a condition; None for none.
        latents: folder of latents encoded ahead of time, in which case batches hold `latent` and
            not `image`; empty to encode on the fly.
        encoded_text: whether captions were encoded ahead of time, into the same folder, in which
            case batches hold `encoded` and not `text`.
    """

    seed: int
    first_stage: FirstStage
    process: Process
    denoiser: UNet | TokenTransformer
    context: ContextPrediction | None
    sampling: SamplingSpec
    microbatches: int
    point_shape: tuple[int, ...]
    condition: ConditionSpec
    text: TextCondition | None = None
    latents: str = ""
    encoded_text: bool = False

    averaged = "denoiser"

    @property
    def num_classes(self) -> int | None:
        """Classes of the denoiser."""
        return self.denoiser.num_classes

    @property
    def image_size(self) -> int:
        """Pixels along a side of the images that it is trained on."""
        return self.point_shape[0] * self.first_stage.downsampling

    @property
    def batch_keys(self) -> tuple[str, ...]:
        """Images or their latents, and the labels or captions that the denoiser reads."""
        source = "latent" if self.latents else "image"
        if self.text:
            return source, "encoded" if self.encoded_text else "text"
        return (source, "label") if self.num_classes else (source,)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """What makes token ids of captions; None when they are not read."""
        return self.text.tokenize if self.text and self.text.vocabulary else None

    def check_sampling(self, spec: SamplingSpec) -> None:
        """Raises ValueError where the model cannot be sampled so; the message names the field."""
        spec.make(self.process)
        if spec.guidance != 1 and not self.condition.dropout:
            raise FieldError(
                "guidance",
                f"is {spec.guidance}: it must be 1 for a model that never trained without its "
                "condition (config.condition.dropout 0)",
            )

    def init(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Initial parameters `{'denoiser': ..., 'context': ...}`, and the own state.

        The denoiser's do not depend on whether there is a context decoder. The first stage's are
        zeros until `prepare` has read them.
        """
        key = random.stream(self.seed, "init/denoiser")
        x = self.process.prior(key[None], self.point_shape)
        t = jnp.zeros(1, jnp.int32)
        given = {}
        if self.num_classes:
            given["label"] = jnp.zeros(1, jnp.int32)
        if self.text:
            given["text"] = jnp.zeros((1, self.text.encoder.length, self.text.encoder.width))
        params = {"denoiser": dict(self.denoiser.init(key, x, t, **given)["params"])}
        frozen = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.first_stage.abstract())
        if self.text:
            encoder = self.text.init(random.stream(self.seed, "init/text"))
            if self.text.frozen:
                frozen["text_encoder"] = jax.tree.map(jnp.zeros_like, encoder)
            else:
                params["denoiser"]["text_encoder"] = encoder
        if self.context:
            vectors = jax.eval_shape(self.first_stage.vectors, frozen, x)
            h = vectors
            if self.context.source == "features":
                h = jax.eval_shape(
                    lambda p: self.denoise(p, x, t, **given).features, params["denoiser"]
                )
            params["context"] = self.context.init(
                random.stream(self.seed, "init/context"),
                features=h.shape[-1],
                channels=vectors.shape[-1],
                dimensions=vectors.ndim - 2,
            )
        return params, {"frozen": frozen, "history": self.process.init_history()}

    def prepare(self, batches: Callable[[], Iterator[Batch]]) -> Any:
        """The own state with the parameters of first stage and text encoder, if they have any."""
        frozen, first_stage = {}, self.first_stage
        if not isinstance(first_stage, Pixels):
            if self.latents and first_stage.scale is None:  # it was measured on the images
                scale = latents_lib.read_manifest(self.latents).scale
                first_stage = dataclasses.replace(first_stage, scale=scale)
            frozen |= frozen_lib.load(first_stage, batches)
        if self.text and self.text.frozen:
            frozen["text_encoder"] = self.text.load()
        if not frozen:
            return None
        return {"frozen": frozen, "history": self.process.init_history()}

    def check_latents(self, extra: dict[str, Any]) -> None:
        """Raises DataError where others than this run's encoded the latents or captions."""
        params = extra["frozen"]["autoencoder"]
        encoders.check_first_stage(self.latents, self.first_stage.model, params, self.point_shape)
        if self.encoded_text:
            params = extra["frozen"]["text_encoder"]
            encoders.check_text(self.latents, self.text.encoder, params, self.text.vocabulary)

    def step(self, params: dict[str, Any], extra: Any, batch: Batch, step: Int[Array, ""]) -> Step:
        """Gradient of (1) over the whole batch, and its terms."""
        indices = jnp.arange(len(batch[self.batch_keys[0]]))
        streams = (random.stream(self.seed, f"train/{name}", step) for name in Keys._fields)
        keys = Keys(*(random.example_keys(stream, indices) for stream in streams))
        # Of the whole batch, however it is split: the history wants every loss at once.
        times = self.process.sample_time(keys.time, extra["history"])

        def grad(params: Any, *arguments: Any) -> tuple[tuple[Any, Metrics], Array]:
            objective = jax.grad(self.objective, has_aux=True)
            grads, (metrics, losses) = objective(params, extra["frozen"], *arguments, step)
            return (grads, metrics), losses

        means, losses = accumulate(grad, params, self.microbatches, batch, keys, times)
        history = self.process.remember(extra["history"], times.t, losses)
        return Step(*means, extra | {"history": history})

    def objective(
        self,
        params: dict[str, Any],
        frozen: dict[str, Any],
        batch: Batch,
        keys: Keys,
        times: Times,
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], tuple[Metrics, Float[Array, "batch"]]]:
        """Equation (1) on one (micro)batch; its terms, and L_denoise of every example."""
        t, weight = times
        if self.latents:
            x_0 = frozen["scale"] * batch["latent"]
        else:
            with jax.named_scope("first_stage"):
                x_0 = self.first_stage.encode(frozen, batch["image"])
        x_t, noise = self.process.corrupt(keys.noise, x_0, t)
        with jax.named_scope("denoiser"):
            told = self._condition(params["denoiser"], frozen, batch, keys.condition)
            output, features = self.denoise(params["denoiser"], x_t, t, **told, rng=keys.dropout[0])
        losses = self.process.loss(output, x_0, x_t, noise, t)
        denoise = (weight * losses).mean()
        if self.context is None:
            return denoise, ({"loss": denoise, "loss/denoise": denoise}, losses)
        with jax.named_scope("context_prediction"):
            h = features
            if self.context.source == "prediction":
                h = self.first_stage.vectors(frozen, self.process.predict_x0(output, x_t, t))
            vectors = self.first_stage.vectors(frozen, x_0)
            weighted, distance = self.context.loss(params["context"], h, vectors, t, keys.context)
            context = (weight * weighted).mean()
        loss = denoise + self.context.warmup(step) * context
        metrics = {"loss": loss, "loss/denoise": denoise, "loss/context": context}
        for stride, column in zip(self.context.strides, distance.T, strict=True):
            metrics[f"distance/stride_{stride}"] = column.mean()
        return loss, (metrics, losses)

    def _condition(
        self, params: Any, frozen: dict[str, Any], batch: Batch, rngs: Key[Array, "batch"]
    ) -> dict[str, Array]:
        """What the denoiser is told of a batch: label or text, and for which examples neither."""
        told = {}
        if self.num_classes:
            told["label"] = batch["label"]
        if self.encoded_text:
            told["text"] = batch["encoded"].astype(jnp.float32)
        elif self.text:
            told["text"] = self.encode_text(params, frozen, batch["text"])
        if self.condition.dropout:
            dropped = jax.vmap(lambda rng: jax.random.bernoulli(rng, self.condition.dropout))(rngs)
            if self.condition.learned_null:
                told["unconditional"] = dropped
            else:
                empty = self.encode_text(params, frozen, self.text.empty)
                told["text"] = jnp.where(dropped[:, None, None], empty, told["text"])
        return told

    def encode_text(
        self, params: Any, frozen: dict[str, Any], tokens: Int[Array, "batch length"]
    ) -> Float[Array, "batch length width"]:
        """Captions as the denoiser reads them.

        Args:
            params: of the denoiser; with those of the text encoder where it is trained along.
            frozen: with those of the text encoder where it is not.
            tokens: of the captions.
        """
        encoder = frozen["text_encoder"] if self.text.frozen else params["text_encoder"]
        return self.text.encode(encoder, tokens)

    def denoise(
        self,
        params: Any,
        x_t: Shaped[Array, "batch *point"],
        t: Int[Array, "batch"],
        *,
        label: Int[Array, "batch"] | None = None,
        text: Float[Array, "batch length width"] | None = None,
        unconditional: Bool[Array, "batch"] | None = None,
        rng: Key[Array, ""] | None = None,
    ) -> Denoised:
        """The denoiser's answer; with `rng` in training mode, which draws dropout from it."""
        params = {name: value for name, value in params.items() if name != "text_encoder"}
        return self.denoiser.apply(
            {"params": params},
            x_t,
            t,
            label=label,
            text=text,
            unconditional=unconditional,
            train=rng is not None,
            rngs={} if rng is None else {"dropout": rng},
        )

    def told(
        self,
        params: Any,
        frozen: dict[str, Any],
        *,
        label: Int[Array, "batch"] | None = None,
        tokens: Int[Array, "batch length"] | None = None,
    ) -> dict[str, Array]:
        """What `predict` is told of a batch, once for all steps: classes, or encoded captions.

        Args:
            params: of the denoiser.
            frozen: of first stage and text encoder.
            label: classes, for a model that has them.
            tokens: token ids of captions, for a model that reads them.

        Raises:
            ValueError: the model reads captions, and there are none.
        """
        if self.text is None:
            return {} if label is None else {"label": label}
        if tokens is None:
            raise ValueError("the model reads captions: give token ids, of empty ones if need be")
        told = {"text": self.encode_text(params, frozen, tokens)}
        return told | {"empty": self.encode_text(params, frozen, self.text.empty)}

    def predict(
        self,
        params: Any,
        x_t: Shaped[Array, "batch *point"],
        t: Int[Array, "batch"],
        *,
        label: Int[Array, "batch"] | None = None,
        text: Float[Array, "batch length width"] | None = None,
        empty: Float[Array, "1 length width"] | None = None,
        guidance: Guidance = NO_GUIDANCE,
    ) -> Shaped[Array, "batch *prediction"]:
        """The denoiser's output, guided; both answers are computed as one batch.

        Args:
            params: of the denoiser.
            x_t: noisy points.
            t: their times.
            label: their classes, for a model that has them.
            text: their encoded captions, for a model that reads them.
            empty: the encoded empty caption, where that stands for no condition.
            guidance: classifier-free guidance.
        """

        def conditional():
            return self.denoise(params, x_t, t, label=label, text=text).output.astype(jnp.float32)

        if guidance.scale == 1:
            return conditional()
        inside = guidance.at(t, self.process.num_steps)

        def guided():
            twice = {"x_t": x_t, "t": t, "label": label, "text": text}
            twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), twice)
            if self.condition.learned_null:
                twice["unconditional"] = jnp.arange(2 * len(t)) >= len(t)
            else:
                twice["text"] = jnp.concatenate([text, jnp.broadcast_to(empty, text.shape)])
            told, untold = jnp.split(self.denoise(params, **twice).output, 2)
            output = self.process.guide(told, untold, guidance)
            if inside is None:
                return output
            return jnp.where(inside.reshape(-1, *(1,) * (told.ndim - 1)), output, told)

        return guided() if inside is None else jax.lax.cond(inside.any(), guided, conditional)

    def preview(self, mesh: Mesh) -> Callable[[Any, Any], np.ndarray]:
        """Samples of the same seeds every time: one sees the same images emerge."""
        generate = make_generate(self, self.sampling, mesh)
        num, texts = self.sampling.num, None
        if self.text:
            texts = self.tokenizer(self.text.in_turn(num))

        def images(params: Any, extra: Any) -> np.ndarray:
            batches = generate_batches(
                generate,
                params,
                extra["frozen"],
                seed=self.seed,
                num=num,
                batch_size=min(num, 64),
                num_classes=self.num_classes,
                texts=texts,
            )
            return np.concatenate(list(batches))

        return images

    def describe(self) -> str:
        """Points and context prediction."""
        points = " x ".join(map(str, self.point_shape))
        if self.context is None:
            return f"points {points}, no context prediction"
        return f"points {points}, context strides {self.context.strides}, {self.context.transport}"
