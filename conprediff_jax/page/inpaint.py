"""Filling what is painted over."""

import math
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from PIL import Image

from conprediff_jax.common.errors import UserError
from conprediff_jax.data import fitting
from conprediff_jax.data.holes import Hole
from conprediff_jax.page import controls, pictures
from conprediff_jax.page.events import Events
from conprediff_jax.page.shown import Shown
from conprediff_jax.sampling.inpainting import laid_over

_COUNTS = (1, 2, 3, 4, 6, 8)
_FITS = {
    "crop": "a crop around the hole",
    "pad": "the whole photo, with a border",
    "resize": "the whole photo, stretched",
}
_RED = "rgba(220, 40, 40, 0.75)"


class Source(NamedTuple):
    """The picture that is painted on, and how many samples were drawn to get one."""

    picture: np.ndarray | None = None
    samples: int = 0


class InpaintTab:
    """The editor and the fillings of one model.

    Args:
        shown: The model.
        events: What runs the functions.
    """

    def __init__(self, shown: Shown, events: Events):
        self._shown, self._model = shown, shown.model.diffusion
        self._source = gr.State(Source())
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                self._add_controls()
            with gr.Column(scale=3, elem_classes="pixels" if shown.is_small else ""):
                self._add_pictures()
        source = [self._source, self._editor]
        events.quick(self._upload.upload, self._read, [self._upload, self._source], source)
        events.on_model(self._sample.click, self._draw, [self._seed, self._source], source)
        inputs = [self._source, self._editor, self._seed, self._num, self._fit]
        inputs += self._settings.values()
        events.on_model(self._button.click, self._fill, inputs, self._fillings)

    def _add_controls(self) -> None:
        with gr.Row():
            self._upload = gr.UploadButton(
                "Upload photo", file_types=["image"], type="binary", size="sm", min_width=100
            )
            self._sample = gr.Button("Draw sample", size="sm", min_width=100)
        self._seed = gr.Number(0, label="Seed", precision=0)
        self._num = gr.Radio(_COUNTS, value=4, label="Fillings")
        height, width = self._model.image_shape
        self._fit = gr.Dropdown(
            [(said, fit) for fit, said in _FITS.items()],
            value="crop",
            label="Of a photo, the model sees",
            info=f"Its images have {width} x {height} pixels",
        )
        self._settings = (
            controls.of_condition(self._shown, one=True)
            | controls.of_filling(self._model)
            | controls.of_guidance(self._model)
        )
        self._button = gr.Button("Fill", variant="primary", elem_classes="draw")

    def _add_pictures(self) -> None:
        self._editor = gr.ImageEditor(
            label="Paint over what is to be filled",
            type="numpy",
            format="png",
            sources=(),
            transforms=(),
            layers=False,
            brush=gr.Brush(default_size=48, colors=[_RED], color_mode="fixed"),
            canvas_size=(512, 512),
            buttons=[],
            height=620,
            placeholder="Upload a photo, or draw a sample",
            elem_classes="editor",
        )
        self._fillings = gr.Gallery(
            show_label=False,
            format="png",
            columns=5,
            height="auto",
            object_fit="contain",
            buttons=["download", "download_all", "fullscreen"],
            elem_classes="grid",
        )

    def _read(self, data: bytes, source: Source) -> tuple[Source, dict[str, Any]]:
        """Takes an uploaded photo."""
        picture = pictures.read(data, self._model.channels)
        return source._replace(picture=picture), _to_paint_on(picture)

    def _draw(
        self,
        seed: int | None,
        source: Source,
        progress: gr.Progress = gr.Progress(),
    ) -> tuple[Source, dict[str, Any]]:
        """Draws a sample to paint on; the next one of the seed every time."""
        with self._shown.meter.shown_by(progress):
            (picture,) = self._shown.model.sample(
                1, **controls.given(["seed"], [seed]), first=source.samples
            )
        return Source(picture, source.samples + 1), _to_paint_on(picture)

    def _fill(
        self,
        source: Source,
        editor: dict[str, Any] | None,
        seed: int | None,
        num: int,
        fit: str,
        *values: Any,
        progress: gr.Progress = gr.Progress(),
    ) -> list[tuple[Image.Image, str]]:
        """Fills what is painted over; a photo keeps its size."""
        if source.picture is None:
            raise UserError("There is no picture: upload a photo, or draw a sample.")
        asked = controls.given(["seed"], [seed])
        settings = controls.given(list(self._settings), values, self._model)
        hole = pictures.painted(editor, source.picture.shape[:2])
        photo = Hole("of the photo", source.picture, ~hole)
        fitted = fitting.from_photo(photo, fit, self._model.image_shape)
        size = self._shown.batch_size
        with self._shown.meter.shown_by(progress, math.ceil(num / size)):
            filled = self._shown.model.fillings(
                fitted.hole, num, batch_size=min(num, size), **asked, **settings
            )
        whole = [laid_over(fitted, filling) for filling in filled]
        named = [(photo.masked, "what is known")]
        named += [(filling, f"filling {number}") for number, filling in enumerate(whole)]
        return [(pictures.shown(picture), name) for picture, name in named]


def _to_paint_on(picture: np.ndarray) -> dict[str, Any]:
    """What the editor shows: the picture, and nothing painted."""
    background = pictures.to_paint_on(picture)
    return {"background": background, "layers": [], "composite": background}
