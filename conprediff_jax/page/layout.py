"""The page as a whole: its tabs, its looks, and the server."""

import os
from collections.abc import Callable, Sequence

import gradio as gr
import jax
from etils import epath

from conprediff_jax.common import hub
from conprediff_jax.common.errors import UserError
from conprediff_jax.common.metric_rows import METRICS
from conprediff_jax.page import pictures
from conprediff_jax.page.compare import CompareTab
from conprediff_jax.page.events import Events
from conprediff_jax.page.inpaint import InpaintTab
from conprediff_jax.page.sample import SampleTab
from conprediff_jax.page.shown import Meter, Shown
from conprediff_jax.page.watch import WatchTab
from conprediff_jax.runs import restore
from conprediff_jax.runs.api import Model

_WAITING = 32  # model calls that may wait in the queue
_HOUR = 3600  # seconds after which what was sent to browsers is deleted

_CSS = """
.gradio-container { max-width: 1280px !important; width: 100%; margin: 0 auto !important; }
.gradio-container .app > .wrap { width: 100%; }
.pixels img { image-rendering: pixelated; }
.grid .grid-wrap { height: auto; min-height: 8rem; max-height: none; overflow: visible; }
.larger .image-frame, .larger .image-frame img, .larger .image-container > button {
  width: 100%; height: 100%; object-fit: contain;
}
footer { display: none !important; }
"""


def open_workdir(
    workdir: str, name: str, mesh: jax.sharding.Mesh, *, step: int | None, batch_size: int
) -> Shown:
    """Opens a workdir with its model. A run that has no model yet is shown without one.

    Args:
        workdir: Workdir of a training run, or a folder for inference.
        name: Its name on the page.
        mesh: The devices.
        step: Step of the checkpoint; None for the newest readable one.
        batch_size: Number of images that are drawn at a time.

    Raises:
        UserError: There is neither a model nor a run.
    """
    meter, model = Meter(), None
    try:
        model = Model(restore.load(workdir, mesh, step), mesh, meter)
    except UserError:
        if not (epath.Path(hub.results_folder(workdir)) / METRICS).exists():
            raise
    return Shown(name=name, workdir=workdir, model=model, meter=meter, batch_size=batch_size)


def names_of(workdirs: Sequence[str]) -> list[str]:
    """Short names of workdirs: their last parts, or their whole paths if these are the same."""
    short = [os.path.basename(os.path.normpath(workdir)) for workdir in workdirs]
    return short if len(set(short)) == len(short) else list(workdirs)


def make(all_shown: Sequence[Shown], explain: Callable[[BaseException], str | None]) -> gr.Blocks:
    """The page of some workdirs.

    Args:
        all_shown: The workdirs.
        explain: See `Events`.
    """
    events, models = Events(explain), [shown for shown in all_shown if shown.model]
    options = {"analytics_enabled": False, "delete_cache": (_HOUR, _HOUR), "fill_width": True}
    with gr.Blocks(title="conprediff_jax", **options) as page:
        gr.Markdown("# conprediff_jax\n\n" + "  \n".join(map(_described, all_shown)))
        for title, tab in (("Sample", SampleTab), ("Inpaint", InpaintTab)):
            if models:
                with gr.Tab(title):
                    _one_of(models, tab, events)
        if len(models) > 1:
            with gr.Tab("Compare"):
                CompareTab(models, events)
        with gr.Tab("Watch"):
            WatchTab(all_shown, events, page.load)
    return page.queue(max_size=_WAITING)


def _one_of(models: Sequence[Shown], tab: type, events: Events) -> None:
    """A tab for every model, or the only one without a title."""
    if len(models) == 1:
        tab(models[0], events)
        return
    for shown in models:
        with gr.Tab(shown.name):
            tab(shown, events)


def _described(shown: Shown) -> str:
    """A workdir in one line of Markdown."""
    if shown.model is None:
        return f"**{shown.name}**: a run without a model so far"
    size = sum(leaf.size for leaf in jax.tree.leaves(shown.model.params))
    height, width = shown.model.diffusion.image_shape
    return (
        f"**{shown.name}**: step {shown.model.step:,}, images of {width} x {height}, "
        f"{size / 1e6:,.1f} million parameters"
    )


def serve(page: gr.Blocks, host: str, port: int) -> str:
    """Serves the page from threads of this process, and returns its address.

    Args:
        page: The page.
        host: Name or address of the interface.
        port: A port that is free.
    """
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=pictures.MOST_BYTES,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        footer_links=[],
        theme=_theme(),
        css=_CSS,
    )
    return address


def _theme() -> gr.themes.Base:
    """A theme with fonts of the machine: none is fetched."""
    return gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
