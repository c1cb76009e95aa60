"""A diffusion model, which is trained, sampled, inpainted, measured, saved and exported.

    images --first stage--> points x_0 --process--> x_t --denoiser, given a condition--> prediction

`DiffusionModel` is a description without parameters. Its functions take two trees of parameters:

    params  the parameters that are trained: those of the denoiser and, under `text_encoder`, those
            of a text encoder that is trained together with it
    frozen  the parameters that are not trained: those of the first stage and, under
            `text_encoder`, those of a text encoder with fixed weights

The context decoder is not part of the model: neither tree holds parameters of it.
"""

import dataclasses
import functools
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, Key, Shaped

from conprediff_jax.common import keys, random
from conprediff_jax.common.errors import FieldError, UserError
from conprediff_jax.common.fields import as_kind, conform
from conprediff_jax.common.keys import fixed
from conprediff_jax.data import Tokenizer
from conprediff_jax.diffusion.guidance import NO_GUIDANCE, Guidance
from conprediff_jax.diffusion.process import Process, Time
from conprediff_jax.models.denoiser import OUTPUT, Denoised, Denoiser
from conprediff_jax.models.first_stage import FirstStage
from conprediff_jax.sampling.spec import SamplingSpec
from conprediff_jax.sampling.text import TextCondition

# Fixed fields that may differ between two models whose points and predictions mean the same.
_NEUTRAL = ("dtype", "scale", "importance")

NULLS = ("learned", "empty")

Points = Shaped[Array, "batch *point"]
Prediction = Shaped[Array, "batch *prediction"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConditionSpec:
    """The `condition` section.

    Attributes:
        dropout: Share of training examples whose condition is dropped, in [0, 1). Classifier-free
            guidance needs it to be above 0; the published models use 0.1.
        null: What stands for no condition: 'learned' for a learned embedding, or 'empty' for the
            empty caption, as in latent diffusion. Labels allow only 'learned'.

    Raises:
        FieldError: A field is out of its range or choices.
    """

    dropout: float = fixed(0.0)
    null: str = fixed("learned")

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise FieldError("dropout", f"is {self.dropout}: it must lie in [0, 1)")
        if self.null not in NULLS:
            raise FieldError("null", f"is {self.null!r}: choose one of {NULLS}")

    @property
    def learned_null(self) -> bool:
        """Whether the denoiser has a learned embedding for no condition."""
        return self.dropout > 0 and self.null == "learned"


class Condition(NamedTuple):
    """The condition of a batch; a field is None where the model does not read it.

    Attributes:
        label: Classes, int32.
        text: Encoded captions, float32.
        empty: The encoded empty caption, float32, which stands for no condition where `null` is
            'empty'.
    """

    label: Int[Array, "batch"] | None = None
    text: Float[Array, "batch length width"] | None = None
    empty: Float[Array, "1 length width"] | None = None


UNCONDITIONAL = Condition()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionModel:
    """A denoiser on the points of a first stage, with its process and its condition.

    Attributes:
        first_stage: Maps images to points and back.
        process: The forward process, which corrupts points and defines what the denoiser predicts.
        denoiser: The network.
        point_shape: Shape of the points of an image of the training data: (rows, columns,
            channels), or (rows, columns) of tokens.
        condition: How the condition is dropped in training.
        text: How captions are read; None for a model without captions.
        sampling: The default settings of sampling.
    """

    first_stage: FirstStage
    process: Process
    denoiser: Denoiser
    point_shape: tuple[int, ...]
    condition: ConditionSpec
    text: TextCondition | None
    sampling: SamplingSpec

    @property
    def num_classes(self) -> int | None:
        """Number of classes that the denoiser knows; None for a model without classes."""
        return self.denoiser.num_classes

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images that the model is trained on, in pixels."""
        rows, columns = self.point_shape[:2]
        return rows * self.first_stage.downsampling, columns * self.first_stage.downsampling

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.first_stage.channels

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, from captions to token ids; None for a model that reads no captions."""
        return self.text.tokenize if self.text and self.text.vocabulary else None

    @property
    def allows_guidance(self) -> bool:
        """Whether there is a prediction that guidance can lead away from."""
        return self.condition.dropout > 0

    def describe(self) -> str:
        """The shape of the points, in words for the log."""
        return f"points {' x '.join(map(str, self.point_shape))}"

    def check_image_size(self, height: int, width: int, name: str) -> None:
        """Checks that the model takes images of a size.

        Args:
            height: Height in pixels.
            width: Width in pixels.
            name: The name of the image in messages.

        Raises:
            UserError: The model does not take this size; the message says which sizes it takes.
        """
        factor, downsampling = self.first_stage.downsampling, self.denoiser.downsampling
        if downsampling is None:
            rows, columns = (factor * side for side in self.point_shape[:2])
            if (height, width) != (rows, columns):
                raise UserError(
                    f"{name}: {width} x {height} pixels; this model takes {columns} x {rows} alone"
                )
            return
        unit = factor * downsampling
        if height % unit or width % unit or not height or not width:
            raise UserError(
                f"{name}: {width} x {height} pixels; this model takes multiples of {unit} a side"
            )

    def of_size(self, height: int, width: int) -> "DiffusionModel":
        """The same model for images of another size, which a network without tables takes.

        Args:
            height: Height in pixels.
            width: Width in pixels.

        Raises:
            UserError: The model does not take this size.
        """
        self.check_image_size(height, width, "size")
        factor = self.first_stage.downsampling
        points = (height // factor, width // factor, *self.point_shape[2:])
        return dataclasses.replace(self, point_shape=points)

    def check_prompts(self, prompts: Sequence[Any], *, name: str = "prompts") -> None:
        """Checks that the model can be conditioned on captions.

        Args:
            prompts: Captions.
            name: The name of the field of captions in messages.

        Raises:
            FieldError: The model reads no captions.
            UserError: The model cannot read one of the captions.
        """
        for prompt in prompts:
            as_kind(name, prompt, str)
            if self.text is None:
                raise FieldError(name, f"is {prompt!r}: the model reads no captions")
            self.tokenizer.check(prompt)

    def check_captions(self, captions: Sequence[str], path: str) -> None:
        """Checks the captions of a text file, which holds one a line; see `check_prompts`.

        Args:
            captions: The captions.
            path: Name of the file, for messages.

        Raises:
            UserError: The model cannot read one of them; the message names file and line.
        """
        for number, caption in enumerate(captions, 1):
            try:
                self.check_prompts([caption], name="the caption")
            except UserError as error:
                raise UserError(f"{path}, line {number}: {error}") from error

    def check_sampling(self, spec: SamplingSpec) -> None:
        """Checks that settings of sampling fit the model.

        Args:
            spec: The settings.

        Raises:
            ValueError: A setting does not fit; the message names the field.
        """
        spec.make(self.process)
        if spec.guidance != 1 and not self.allows_guidance:
            raise FieldError(
                "guidance",
                f"is {spec.guidance}: guidance other than 1 needs a guide, or a model trained with "
                "condition dropout (config.condition.dropout > 0)",
            )

    def sampling_with(self, **settings: Any) -> SamplingSpec:
        """The model's `sampling` section with some settings replaced.

        Args:
            **settings: New values by field of the section; None leaves a field as it is.

        Raises:
            FieldError: A setting does not fit the model.
            UserError: Settings do not fit each other.
        """
        return self.checked_sampling(self.sampling, **settings)

    def checked_sampling(self, base: SamplingSpec, **settings: Any) -> SamplingSpec:
        """As `sampling_with`, with `base` in the place of the model's own section."""
        given = {name: value for name, value in settings.items() if value is not None}
        names = [field.name for field in dataclasses.fields(base)]
        for name in given:
            if name not in names:
                raise FieldError(
                    name, f"does not fit this model: its sampling has {', '.join(names)}"
                )
        try:
            spec = base.with_settings(**conform(type(base), given))
            self.check_sampling(spec)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from error
        return spec

    def init(self, seed: int | Integer[Array, ""]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Initial `params`, float32, and `frozen`, which holds zeros until weights are loaded."""
        key = random.stream(seed, "init/denoiser")
        x, t, condition = self.example()
        x, t = self.process.network_input(x, t), self.process.network_time(t)
        params = dict(
            self.denoiser.init(key, x, t, label=condition.label, text=condition.text)["params"]
        )
        frozen = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.first_stage.abstract())
        if self.text:
            encoder = self.text.init(random.stream(seed, "init/text"))
            if self.text.has_fixed_weights:
                frozen["text_encoder"] = jax.tree.map(jnp.zeros_like, encoder)
            else:
                params["text_encoder"] = encoder
        return params, frozen

    def example(self) -> tuple[Points, Time, Condition]:
        """A batch of one example: noisy points, their time, and a condition of the right shapes."""
        x = self.process.prior(jax.random.key(0)[None], self.point_shape)
        label = text = None
        if self.num_classes:
            label = jnp.zeros(1, jnp.int32)
        if self.text:
            text = jnp.zeros((1, self.text.encoder.length, self.text.encoder.width))
        t = jnp.asarray(self.process.evaluated_times(1)[:1])
        return x, t, Condition(label=label, text=text)

    def encode_text(
        self, params: Any, frozen: dict[str, Any], tokens: Int[Array, "batch length"]
    ) -> Float[Array, "batch length width"]:
        """Encodes captions, given as token ids, for the denoiser; float32."""
        tree = frozen if self.text.has_fixed_weights else params
        return self.text.encode(tree["text_encoder"], tokens)

    def encode_condition(
        self,
        params: Any,
        frozen: dict[str, Any],
        *,
        label: Int[Array, "batch"] | None = None,
        tokens: Int[Array, "batch length"] | None = None,
    ) -> Condition:
        """The condition of a batch, encoded once for all steps of sampling.

        Args:
            params: See the module.
            frozen: See the module.
            label: Classes, for a model with classes.
            tokens: Token ids of captions, for a model that reads captions.

        Raises:
            ValueError: The model reads captions, and `tokens` is None.
        """
        if self.text is None:
            return Condition(label=label)
        if tokens is None:
            raise ValueError("the model reads captions: give token ids, if only of empty captions")
        return Condition(
            text=self.encode_text(params, frozen, tokens),
            empty=self.encode_text(params, frozen, self.text.empty),
        )

    def denoise(
        self,
        params: Any,
        x_t: Points,
        t: Time,
        condition: Condition,
        *,
        unconditional: Bool[Array, "batch"] | None = None,
        rng: Key[Array, ""] | None = None,
        taps: Sequence[str] = (),
    ) -> Denoised:
        """The denoiser's output and features.

        Args:
            params: See the module.
            x_t: Noisy points.
            t: Their times.
            condition: Their condition.
            unconditional: True for examples whose condition the learned null replaces; None for no
                example.
            rng: Key of dropout in training; None for inference.
            taps: Names of the features to return as well, see `Denoised`.
        """
        inner = tuple(name for name in taps if name != OUTPUT)
        asked = {"taps": inner} if inner else {}  # a denoiser need not know of taps
        params = {name: value for name, value in params.items() if name != "text_encoder"}
        return self.denoiser.apply(
            {"params": params},
            self.process.network_input(x_t, t),
            self.process.network_time(t),
            label=condition.label,
            text=condition.text,
            unconditional=unconditional,
            train=rng is not None,
            rngs={} if rng is None else {"dropout": rng},
            **asked,
        )

    def predict(
        self,
        params: Any,
        x_t: Points,
        t: Time,
        condition: Condition = UNCONDITIONAL,
        guidance: Guidance = NO_GUIDANCE,
    ) -> Prediction:
        """The denoiser's output under guidance, float32.

        Outputs with and without the condition are computed as one batch of twice the size.

        Args:
            params: See the module.
            x_t: Noisy points.
            t: Their times.
            condition: Their condition.
            guidance: Classifier-free guidance.
        """

        def conditional():
            return self.denoise(params, x_t, t, condition).output.astype(jnp.float32)

        both = functools.partial(self._both_outputs, params, x_t, t, condition)
        return self.guided(t, guidance, conditional, both)

    def guided(
        self,
        t: Time,
        guidance: Guidance,
        good: Callable[[], Prediction],
        good_and_bad: Callable[[], tuple[Prediction, Prediction]],
    ) -> Prediction:
        """The prediction under guidance.

        Args:
            t: Times.
            guidance: How predictions are combined, and at which times.
            good: A function that computes the prediction without guidance, which alone is called
                where no time has guidance.
            good_and_bad: A function that computes this prediction, and the one that guidance leads
                away from.
        """
        if guidance.scale == 1:
            return good()
        inside = guidance.at(t, self.process.time_at)

        def combined():
            better, worse = good_and_bad()
            output = self.process.guide(better, worse, guidance)
            if inside is None:
                return output
            inside_points = inside.reshape(-1, *(1,) * (output.ndim - 1))
            return jnp.where(inside_points, output, better)

        return combined() if inside is None else jax.lax.cond(inside.any(), combined, good)

    def _both_outputs(
        self, params: Any, x_t: Points, t: Time, condition: Condition
    ) -> tuple[Prediction, Prediction]:
        """Outputs with the condition and without it."""
        label, text, empty = condition
        x_t, t, label = jax.tree.map(lambda x: jnp.concatenate([x, x]), (x_t, t, label))
        unconditional = None
        if self.condition.learned_null:
            unconditional = jnp.arange(len(t)) >= len(t) // 2
            empty = text
        if text is not None:
            text = jnp.concatenate([text, jnp.broadcast_to(empty, text.shape)])
        twice = Condition(label=label, text=text)
        output = self.denoise(params, x_t, t, twice, unconditional=unconditional).output
        return tuple(jnp.split(output, 2))

    def predictor(
        self, params: Any, condition: Condition, guidance: Guidance = NO_GUIDANCE
    ) -> Callable[[Points, Time], Prediction]:
        """The function `(x_t, t) -> prediction` that samplers call; see `predict`."""
        return lambda x_t, t: self.predict(params, x_t, t, condition, guidance)


def check_same(what: str, theirs: Any, ours: Any) -> None:
    """Checks that parts of two models agree in all fields that parameters depend on.

    Args:
        what: The name of the part, for messages.
        theirs: The part of the other model; None if it has none.
        ours: The part of this model.

    Raises:
        UserError: They differ; the message names the fields, and the values on both sides.
    """
    if theirs is None and ours is None:
        return
    if type(theirs) is not type(ours):
        raise UserError(f"{what} is a {type(theirs).__name__} there, a {type(ours).__name__} here")
    differing = []
    names = (*keys.fixed_names(type(ours)), *keys.derived_names(type(ours)))
    for name in (name for name in names if name not in _NEUTRAL):
        there, here = getattr(theirs, name), getattr(ours, name)
        if dataclasses.is_dataclass(here):  # an autoencoder or a text encoder
            check_same(f"{what}'s {name}", there, here)
        elif there != here:
            there, here = (textwrap.shorten(str(value), 60) for value in (there, here))
            differing.append(f"{name} {there} there, {here} here")
    if differing:
        raise UserError(f"{what} is another one: {', '.join(differing)}")


class TrainedModel(NamedTuple):
    """A diffusion model with its parameters.

    Attributes:
        model: The description of the model.
        params: Average of the trained parameters, without those of the context decoder.
        frozen: Parameters that were not trained.
        step: Number of training steps that made the parameters.
        average: Which average of the trained parameters they are, for records of images.
        class_names: Names of the classes by number; () for a model without classes, or with classes
            that have no names.
    """

    model: DiffusionModel
    params: Any
    frozen: Any
    step: int
    average: str = ""
    class_names: tuple[str, ...] = ()
