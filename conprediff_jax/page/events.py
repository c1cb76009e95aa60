"""How events of the page run: one call of a model at a time, and one clear message for an error."""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import gradio as gr
from absl import logging

from conprediff_jax.common.errors import UserError, first_line

_SHOWN = 12.0  # seconds for which a message stays on the page


class Events:
    """Connects the controls of the page with functions.

    Args:
        explain: A function from an error of the machine to one line, or to None if it does not
            know the error.
    """

    def __init__(self, explain: Callable[[BaseException], str | None]):
        self._explain = explain

    def on_model(
        self,
        trigger: Callable,
        function: Callable,
        inputs: Any,
        outputs: Any,
        *,
        streams: bool = False,
    ) -> None:
        """Runs a function that calls a model. The calls of all users wait in one queue.

        Args:
            trigger: What starts the function, such as `button.click`.
            function: The function.
            inputs: The components whose values it takes.
            outputs: The components that show what it returns.
            streams: Whether the function is a generator, whose values are shown one after another.
        """
        trigger(
            self._guarded_generator(function) if streams else self._guarded(function),
            inputs,
            outputs,
            concurrency_id="model",
            concurrency_limit=1,
            api_visibility="private",
        )

    def quick(self, trigger: Callable, function: Callable, inputs: Any, outputs: Any) -> None:
        """Runs a function that calls no model, at once; `on_model` explains the arguments."""
        trigger(
            self._guarded(function),
            inputs,
            outputs,
            concurrency_limit=None,
            show_progress="hidden",
            api_visibility="private",
        )

    def _guarded(self, function: Callable) -> Callable:
        """The function, whose errors become one message on the page."""

        @functools.wraps(function)
        def call(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except Exception as error:
                self._fail(error)

        return call

    def _guarded_generator(self, function: Callable) -> Callable:
        """As `_guarded`, for a generator."""

        def attempt(*args, **kwargs):
            try:
                yield from function(*args, **kwargs)
            except Exception as error:
                self._fail(error)

        # Gradio asks whether a function is a generator; a lambda is one, whatever wraps `attempt`.
        return functools.update_wrapper(
            lambda *args, **kwargs: (yield from attempt(*args, **kwargs)), function
        )

    def _fail(self, error: Exception) -> NoReturn:
        said = str(error) if isinstance(error, UserError) else self._explain(error)
        if said is None:
            logging.exception("an event of the page failed")
            said = f"Something went wrong: {first_line(error)}. The terminal has the details."
        raise gr.Error(
            said, duration=_SHOWN, title="This does not work", print_exception=False
        ) from error
