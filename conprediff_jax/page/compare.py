"""Two models on the same seeds, with a slider between them."""

import math
from collections.abc import Sequence
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from conprediff_jax.common import images
from conprediff_jax.page import controls, pictures
from conprediff_jax.page.events import Events
from conprediff_jax.page.shown import Shown

_SIDE = 768  # pixels of the grids on the page, at least


class CompareTab:
    """The controls and the two grids.

    Every model is sampled as its own config says. A control appears if it fits all models.

    Args:
        all_shown: The models, two at least.
        events: What runs the functions.
    """

    def __init__(self, all_shown: Sequence[Shown], events: Events):
        self._shown = {shown.name: shown for shown in all_shown}
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                self._add_controls()
            small = all(shown.is_small for shown in all_shown)
            with gr.Column(scale=3, elem_classes="pixels" if small else ""):
                self._slider = gr.ImageSlider(
                    label="Drag the line between the models",
                    format="png",
                    type="pil",
                    interactive=False,
                    max_height=_SIDE,
                    buttons=["download", "fullscreen"],
                )
                self._said = gr.Markdown()
        inputs = [self._left, self._right, self._seed, self._num, *self._settings.values()]
        events.on_model(self._button.click, self._draw, inputs, [self._slider, self._said])

    def _add_controls(self) -> None:
        first, second, *_ = names = list(self._shown)
        self._left = gr.Dropdown(names, value=first, label="Left")
        self._right = gr.Dropdown(names, value=second, label="Right")
        self._seed = gr.Number(0, label="Seed", precision=0)
        self._num = gr.Radio(controls.NUMBERS, value=16, label="Images")
        self._settings = {}
        shown, *others = self._shown.values()
        condition = controls.of_condition(shown) if _same_condition(shown, others) else {}
        self._settings = condition
        self._button = gr.Button("Draw both", variant="primary", elem_classes="draw")

    def _draw(
        self,
        left: str,
        right: str,
        seed: int | None,
        num: int,
        *values: Any,
        progress: gr.Progress = gr.Progress(),
    ) -> tuple[tuple[Image.Image, Image.Image], str]:
        """Draws the same images of both models."""
        asked = controls.given(["seed"], [seed]) | controls.given(list(self._settings), values)
        grids, said = [], []
        for side, name in (("Left", left), ("Right", right)):
            shown = self._shown[name]
            with shown.meter.shown_by(progress, math.ceil(num / shown.batch_size)):
                drawn = shown.model.sample(num, batch_size=shown.batch_size, **asked)
            grids.append(images.as_rgb(images.grid(drawn)))
            how = shown.model.diffusion.sampling.describe()
            said.append(f"{side}: **{name}**, step {shown.model.step:,}, {how}.")
        height = max(_SIDE, *(len(grid) for grid in grids))
        return tuple(_resized(grid, height) for grid in grids), " ".join(said)


def _same_condition(shown: Shown, others: Sequence[Shown]) -> bool:
    """Whether models know the same classes, and all or none read captions."""
    return all(
        other.classes == shown.classes
        and (other.model.diffusion.text is None) == (shown.model.diffusion.text is None)
        for other in others
    )


def _resized(grid: np.ndarray, height: int) -> Image.Image:
    """The grid at a height, so that grids of different models lie over each other."""
    picture = pictures.shown(grid)
    width = round(picture.width * height / picture.height)
    return picture.resize((width, height), Image.Resampling.NEAREST)
