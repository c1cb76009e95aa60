"""Drawing images: a grid, and one of its images alone, on its way from noise."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import gradio as gr
import jax
import numpy as np
from PIL import Image

from conprediff_jax.page import controls, pictures
from conprediff_jax.page.events import Events
from conprediff_jax.page.shown import Shown

_STAGES = 16  # of the way from noise to an image


class Drawn(NamedTuple):
    """What a grid was drawn by.

    Attributes:
        seed: The seed.
        first: Index of the first image.
        settings: Arguments of `Model.sample`.
    """

    seed: int
    first: int
    settings: dict[str, Any]


class Frame(NamedTuple):
    """An image on its way from noise.

    Attributes:
        said: Where it is on its way.
        points: The image as it is.
        estimate: The image that the network predicted; None where there is none.
    """

    said: str
    points: Image.Image
    estimate: Image.Image | None


class SampleTab:
    """The controls, the grid and the chosen image of one model.

    Args:
        shown: The model.
        events: What runs the functions.
    """

    def __init__(self, shown: Shown, events: Events):
        self._shown = shown
        self._drawn, self._frames = gr.State(), gr.State([])
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                self._add_controls()
            with gr.Column(scale=3, elem_classes="pixels" if shown.is_small else ""):
                self._add_pictures()
        inputs = [self._seed, self._first, self._num, *self._settings.values()]
        events.on_model(self._button.click, self._draw, inputs, [self._grid, self._drawn])
        chosen = [self._title, *self._views, self._stage, self._frames]
        events.on_model(self._grid.select, self._choose, self._drawn, chosen, streams=True)
        events.quick(
            self._stage.input, self._look, [self._stage, self._frames], [self._title, *self._views]
        )

    def _add_controls(self) -> None:
        with gr.Row():
            self._seed = gr.Number(0, label="Seed", precision=0, min_width=100)
            self._first = gr.Number(0, label="First image", precision=0, min_width=100)
        self._num = gr.Radio(controls.NUMBERS, value=16, label="Images")
        condition = controls.of_condition(self._shown)
        self._settings = condition | controls.of_sampling(self._shown.model.diffusion)
        self._button = gr.Button("Draw", variant="primary", elem_classes="draw")

    def _add_pictures(self) -> None:
        self._grid = gr.Gallery(
            show_label=False,
            format="png",
            columns=8,
            height="auto",
            object_fit="contain",
            allow_preview=False,
            buttons=["download_all"],
            elem_classes="grid",
        )
        self._title = gr.Markdown(
            "Click an image to draw it alone, and to see it on its way from noise."
        )
        views = {"format": "png", "interactive": False, "visible": False, "height": 360}
        views["elem_classes"] = "larger"
        with gr.Row():
            self._views = [
                gr.Image(label=label, buttons=["download", "fullscreen"], **views)
                for label in ("The image on its way", "What the network predicts")
            ]
        self._stage = gr.Slider(
            0, _STAGES, step=1, label="From noise to image", visible=False, buttons=[]
        )

    def _draw(
        self,
        seed: int | None,
        first: int | None,
        num: int,
        *values: Any,
        progress: gr.Progress = gr.Progress(),
    ) -> tuple[list[tuple[Image.Image, str]], Drawn]:
        asked = controls.given(["seed", "first"], [seed, first])
        settings = controls.given(list(self._settings), values)
        size = self._shown.batch_size
        with self._shown.meter.shown_by(progress, math.ceil(num / size)):
            drawn = self._shown.model.sample(num, batch_size=size, **asked, **settings)
        named = [(pictures.shown(image), f"{first + i}") for i, image in enumerate(drawn)]
        return named, Drawn(settings=settings, **asked)

    def _choose(
        self, drawn: Drawn | None, event: gr.SelectData
    ) -> Iterator[tuple[Any, Any, Any, Any, list[Frame]]]:
        """Draws the chosen image alone, and shows it on its way from noise."""
        index, frames = drawn.first + event.index, []
        model = self._shown.model
        for stage in model.stages(_STAGES, drawn.seed, index=index, **drawn.settings):
            at = f"after {stage.done} of {stage.calls} calls of the network"
            said = f"**Image {index} of seed {drawn.seed}**, {at}"
            frames.append(Frame(said, *map(_picture, (stage.points, stage.estimate))))
            last = len(frames) - 1
            slider = gr.update(visible=True, value=last, maximum=max(last, 1))
            yield *self._look(last, frames), slider, frames

    def _look(self, stage: int, frames: list[Frame]) -> tuple[Any, Any, Any]:
        """One stage of the way from noise."""
        frame = frames[min(stage, len(frames) - 1)]
        estimates = any(frame.estimate is not None for frame in frames)
        return (
            frame.said,
            gr.update(value=frame.points, visible=True),
            gr.update(value=frame.estimate, visible=estimates),
        )


def _picture(images: jax.Array | None) -> Image.Image | None:
    """The first of some images; None for none."""
    return None if images is None else pictures.shown(np.asarray(images)[0])
