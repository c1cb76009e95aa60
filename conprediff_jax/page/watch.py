"""A run in progress: its curves and its sample grids."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gradio as gr
import pandas as pd

from conprediff_jax.page import run_log
from conprediff_jax.page.events import Events
from conprediff_jax.page.shown import Shown

_SECONDS = 5  # between two looks at the run


class Seen(NamedTuple):
    """What the page shows of a run, so that it is not sent again.

    Attributes:
        run: Name of the run.
        group: Which curves.
        rows: Number of lines of numbers.
        grids: Number of sample grids.
        place: Which of the grids, counted from 1.
    """

    run: str = ""
    group: str | None = None
    rows: int = 0
    grids: int = 0
    place: int = 0


class WatchTab:
    """The log of one run at a time, which the page reads again every few seconds.

    Args:
        all_shown: The workdirs.
        events: What runs the functions.
        loaded: The event of the page that is loaded.
    """

    def __init__(self, all_shown: Sequence[Shown], events: Events, loaded: Callable):
        self._workdirs = {shown.name: shown.workdir for shown in all_shown}
        names, self._seen = list(self._workdirs), gr.State(Seen())
        with gr.Row():
            self._run = gr.Radio(names, value=names[0], label="Run", visible=len(names) > 1)
            self._group = gr.Dropdown([], label="Curves", scale=0, min_width=240)
        self._said = gr.Markdown()
        with gr.Row():
            self._plot = gr.LinePlot(x="step", y="value", color="curve", buttons=[], scale=3)
            with gr.Column(elem_classes="pixels", scale=2):
                self._grid = gr.Image(
                    label="Sample grid",
                    format="png",
                    height=360,
                    elem_classes="larger",
                    buttons=["download", "fullscreen"],
                )
                self._place = gr.Slider(1, 2, 1, step=1, visible=False, buttons=[])
        shown = [self._said, self._group, self._plot, self._grid, self._place, self._seen]
        inputs = [self._run, self._group, self._place, self._seen]
        changed = (self._run.input, self._group.input, self._place.release)
        for trigger in (loaded, gr.Timer(_SECONDS).tick, *changed):
            events.quick(trigger, self._look, inputs, shown)

    def _look(self, run: str, group: str | None, place: int, seen: Seen) -> tuple[Any, ...]:
        """Reads what the run has written; what has not changed since is not sent."""
        log = run_log.read(self._workdirs[run])
        group = group if group in log.groups else next(iter(log.groups), None)
        newest = len(log.grids)
        if run != seen.run or place >= seen.grids:  # follow the run
            place = newest
        now = Seen(run, group, len(log.rows), newest, place)
        if now == seen:
            return log.said(), *[gr.skip()] * 5
        points = log.curves(group) if group else []
        plot = pd.DataFrame(points, columns=["step", "curve", "value"]) if points else None
        return (
            log.said(),
            gr.update(choices=log.groups, value=group),
            plot,
            *self._grid_at(log, place),
            now,
        )

    def _grid_at(self, log: run_log.RunLog, place: int) -> tuple[Any, Any]:
        """The grid at a place, and the slider."""
        if not log.grids:
            return gr.update(value=None), gr.update(visible=False)
        step, file = list(log.grids.items())[place - 1]
        grid = gr.update(value=run_log.read_grid(file), label=f"Sample grid of step {step:,}")
        count = len(log.grids)
        return grid, gr.update(
            maximum=max(count, 2), value=place, visible=count > 1, label=f"Grid, of {count}"
        )
