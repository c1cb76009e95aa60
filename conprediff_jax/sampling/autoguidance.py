"""Guidance of a model by a worse one (autoguidance).

    D = D_g + w (D_m - D_g),                                                              (1)

where D_m is the prediction of the model, D_g that of its guide, and w the scale of the guidance. A
guide makes the errors of the model, and larger ones, so the step away from it leads to where the
model is more certain. The guide is a smaller model, or the same model trained for fewer steps, on
the same points and noise. Both predictions have the condition, so models without a condition can be
guided, too.

Source: Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself" (arXiv
2406.02507), eq. (3). The paper guides at all times; intervals of times are allowed here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Int

from conprediff_jax.common.errors import UserError
from conprediff_jax.diffusion.guidance import NO_GUIDANCE, Guidance
from conprediff_jax.diffusion.process import Time
from conprediff_jax.sampling.model import (
    Condition,
    DiffusionModel,
    Points,
    Prediction,
    TrainedModel,
    check_same,
)
from conprediff_jax.sampling.spec import SamplingSpec

# Two runs measure the scale of the same latents on different images.
_SAME_SHARE = 0.01


class GuidedParams(NamedTuple):
    """The parameters of a guided model, in the place of `params` of other models.

    Attributes:
        main: `params` of the model.
        guide: `params` of its guide.
        guide_frozen: What the guide needs of its `frozen`: the text encoder, if it is in there.
    """

    main: Any
    guide: Any
    guide_frozen: dict[str, Any]


class GuidedCondition(NamedTuple):
    """The condition of a batch, as each of the two models encodes it."""

    main: Condition
    guide: Condition


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidedModel(DiffusionModel):
    """A diffusion model whose guidance is that of another one; `params` are `GuidedParams`.

    Attributes:
        guide: The other model.
        guide_name: Where the guide comes from, in words.
    """

    guide: DiffusionModel
    guide_name: str

    @property
    def allows_guidance(self) -> bool:
        """True: a guide needs no condition dropout."""
        return True

    def check_sampling(self, spec: SamplingSpec) -> None:
        """As in the base class; logs a warning where the guide would change nothing."""
        super().check_sampling(spec)
        if spec.guidance == 1:
            logging.warning("guidance is 1: the guide %s changes nothing", self.guide_name)

    def encode_condition(
        self,
        params: GuidedParams,
        frozen: dict[str, Any],
        *,
        label: Int[Array, "batch"] | None = None,
        tokens: Int[Array, "batch length"] | None = None,
    ) -> GuidedCondition:
        """As in the base class, for both models."""
        return GuidedCondition(
            main=super().encode_condition(params.main, frozen, label=label, tokens=tokens),
            guide=self.guide.encode_condition(
                params.guide,
                params.guide_frozen,
                label=label if self.guide.num_classes else None,
                tokens=tokens if self.guide.text else None,
            ),
        )

    def predictor(
        self,
        params: GuidedParams,
        condition: GuidedCondition,
        guidance: Guidance = NO_GUIDANCE,
    ) -> Callable[[Points, Time], Prediction]:
        """As in the base class, with the prediction of the guide by equation (1)."""
        main = super().predictor(params.main, condition.main)
        guide = self.guide.predictor(params.guide, condition.guide)

        def predict(x_t: Points, t: Time) -> Prediction:
            return self.guided(
                t, guidance, lambda: main(x_t, t), lambda: (main(x_t, t), guide(x_t, t))
            )

        return predict


def guided_by(trained: TrainedModel, guide: TrainedModel, name: str) -> TrainedModel:
    """A trained model with a guide.

    Args:
        trained: The model.
        guide: Its guide, on the same mesh.
        name: Where the guide comes from, in words.

    Raises:
        UserError: The guide has other points, another first stage, another process or another
            condition.
    """
    ours, theirs = trained.model, guide.model
    _check_fits(ours, theirs, name)
    text_encoder, first_stage = {}, dict(guide.frozen)
    if "text_encoder" in first_stage:
        text_encoder["text_encoder"] = first_stage.pop("text_encoder")
    for part, leaf in first_stage.items():
        if not _same_values(leaf, trained.frozen[part]):
            raise UserError(
                f"the guide {name} has a first stage of other weights than the model's, so that "
                "its points mean other images"
            )
    fields = {field.name: getattr(ours, field.name) for field in dataclasses.fields(DiffusionModel)}
    return trained._replace(
        model=GuidedModel(**fields, guide=theirs, guide_name=name),
        params=GuidedParams(trained.params, guide.params, text_encoder),
    )


def guide_of(model: DiffusionModel) -> dict[str, str]:
    """What a record of images says about the guide of their model; nothing if it has none."""
    return {"guide": model.guide_name} if isinstance(model, GuidedModel) else {}


def _check_fits(ours: DiffusionModel, theirs: DiffusionModel, name: str) -> None:
    if theirs.point_shape != ours.point_shape:
        raise UserError(
            f"the guide {name} has points of {theirs.point_shape}, the model of {ours.point_shape}"
        )
    for part in ("first_stage", "process"):
        check_same(f"the guide {name}: its {part}", getattr(theirs, part), getattr(ours, part))
    if theirs.num_classes not in (None, ours.num_classes):
        raise UserError(
            f"the guide {name} knows {theirs.num_classes} classes, the model "
            f"{ours.num_classes or 'none'}"
        )
    if theirs.text and (
        not ours.text
        or theirs.text.vocabulary != ours.text.vocabulary
        or theirs.text.encoder.length != ours.text.encoder.length
    ):
        raise UserError(
            f"the guide {name} reads captions, and the model "
            f"{'has another tokenizer' if ours.text else 'reads none'}"
        )


def _same_values(tree: Any, other: Any) -> bool:
    """Whether whole numbers are the same, and others the same but for `_SAME_SHARE`."""

    def same(x: Any, y: Any) -> bool:
        share = _SAME_SHARE if jnp.issubdtype(jnp.result_type(x), jnp.floating) else 0
        return bool(jnp.allclose(x, y, rtol=share, atol=0))

    return all(jax.tree.leaves(jax.tree.map(same, tree, other)))
