"""The controls of sampling that fit a model, and what their values mean."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from conprediff_jax.common.errors import FieldError, UserError
from conprediff_jax.diffusion.categorical import CategoricalProcess
from conprediff_jax.diffusion.samplers import categorical, masked
from conprediff_jax.page.shown import Shown
from conprediff_jax.sampling import inpainting
from conprediff_jax.sampling.model import DiffusionModel
from conprediff_jax.sampling.spec.continuous import ContinuousSampling, SolverSampling
from conprediff_jax.sampling.spec.tokens import RevealSampling

NUMBERS = (1, 4, 9, 16, 25, 36, 64)  # of images in a grid

_ALL = "all in turn"
_MOST_STEPS = 1000  # of a sampler, since all users wait for it

Controls = dict[str, gr.components.Component]


def of_sampling(model: DiffusionModel) -> Controls:
    """The controls of a model's `sampling` section, by the names of its fields."""
    spec = model.sampling
    controls: Controls = {}
    if isinstance(spec, SolverSampling):
        controls["sampler"] = gr.Dropdown(list(spec.owned), value=spec.sampler, label="Sampler")
    controls["steps"] = gr.Number(spec.steps, label="Steps", precision=0)
    if isinstance(spec, RevealSampling):
        of_replacing = isinstance(model.process, CategoricalProcess)
        ways = categorical.REVEALS if of_replacing else masked.REVEALS
        controls["reveal"] = gr.Dropdown(list(ways), value=spec.reveal, label="Reveal tokens by")
        controls["truncation"] = gr.Slider(
            0.01, 1, spec.truncation, step=0.01, label="Truncation", info="Share of mass kept"
        )
    return controls | of_guidance(model)


def of_guidance(model: DiffusionModel) -> Controls:
    """The scale of guidance, for a model that can be guided."""
    if not model.allows_guidance:
        return {}
    return {
        "guidance": gr.Slider(
            0, 10, model.sampling.guidance, step=0.1, label="Guidance", info="1 is no guidance"
        )
    }


def of_condition(shown: Shown, *, one: bool = False) -> Controls:
    """The class or the captions, for a model that has a condition.

    Args:
        shown: The model.
        one: Whether all images have one caption, and not several in turn.
    """
    model, controls = shown.model.diffusion, {}
    if shown.classes:
        names = [(name, number) for number, name in enumerate(shown.classes)]
        controls["label"] = gr.Dropdown([(_ALL, -1), *names], value=-1, label="Class")
    if model.text and one:
        controls["prompt"] = gr.Textbox(label="Caption", placeholder="The empty caption")
    elif model.text:
        controls["prompts"] = gr.Textbox(
            "\n".join(model.text.prompts[:4]),
            lines=3,
            label="Captions",
            info="One a line; images take them in turn",
        )
    return controls


def of_filling(model: DiffusionModel) -> Controls:
    """How holes are filled: by RePaint, or by a sampler whose known part is replaced.

    The value is the name of a quality or of a sampler. Models of tokens have one way alone.
    """
    ways = [
        (said, name) for name, way in _ways(model).items() if (said := _described(model, **way))
    ]
    return {"way": gr.Dropdown(ways, value=ways[0][1], label="Filled by")} if ways else {}


def _ways(model: DiffusionModel) -> dict[str, dict[str, str]]:
    """The settings of every way to fill a hole, by the name of the way."""
    if not isinstance(model.sampling, ContinuousSampling):
        return {}
    solvers = model.sampling.owned if isinstance(model.sampling, SolverSampling) else ()
    repaint = {name: {"quality": name} for name in inpainting.QUALITIES}
    return repaint | {name: {"sampler": name} for name in solvers}


def _described(
    model: DiffusionModel, quality: str | None = None, sampler: str | None = None
) -> str:
    """A way to fill a hole, in words; '' if it does not fit the model."""
    try:
        spec = inpainting.sampling_for(model, quality=quality, sampler=sampler)
    except UserError:
        return ""
    return f"{sampler or f'RePaint, {quality}'}: {spec.make(model.process).num_model_calls:,} calls"


def given(
    controls: Sequence[str], values: Sequence[Any], model: DiffusionModel | None = None
) -> dict[str, Any]:
    """The arguments of `Model.sample` or `Model.fillings` that the values of controls stand for.

    Args:
        controls: Names of the controls.
        values: Their values.
        model: The model, where `way` is one of the controls.

    Raises:
        FieldError: A number is missing, or there are too many steps.
    """
    found = dict(zip(controls, values, strict=True))
    for name, value in found.items():
        if value is None:
            raise FieldError(name, "is empty: give a number")
    if found.get("steps", 0) > _MOST_STEPS:
        raise FieldError("steps", f"is {found['steps']:,}: the page takes {_MOST_STEPS:,} at most")
    if found.get("label") == -1:
        found["label"] = None
    if "prompts" in found:
        found["prompts"] = found["prompts"].strip().splitlines() or [""]
    if "way" in found:
        found |= _ways(model)[found.pop("way")]
    return found
