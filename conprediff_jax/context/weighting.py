"""When a term of the training loss acts: at which diffusion times, and until which step.

The factor of a term at a training step and a diffusion time t is

    lambda(step, t) = weight * w(t) * warmup(step) * fall_off(step)                        (1)

    constant  w = 1            signal  w = a            snr   w = min(1, a / (1 - a))
    noise     w = 1 - a        bell    w = 4 a (1 - a)                                     (2)

with a = alpha_bar_t, the share of the signal that is kept. From the step at which a term begins to
stop, `fall_off` goes from 1 to 0 along half a cosine. This step is a given share of the run, or the
first at which the moving average of

    c = <g, g_term> / (|g| |g_term|)                                                       (3)

is below a threshold. Here g_term is the gradient of the term with respect to the parameters that it
reaches, and g that of the denoising loss with respect to the same parameters. Stopping by (3) is
the trigger of HASTE (Wang et al. 2025, arXiv 2505.16792), where alignment helps early in training
and hurts late.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Real

TIME_WEIGHTINGS = ("constant", "signal", "snr", "noise", "bell")

Time = Real[Array, "batch"]
Scalar = Float[Array, ""]

_DECAY = 0.9  # of the moving average of (3): about the last ten measurements


# Roles of fields, for the code that builds a config. They are those of `common.keys`, written out
# because this folder does not import that module.
def fixed(default: Any) -> Any:
    """A field that the parameters of a decoder depend on."""
    return dataclasses.field(default=default, metadata={"role": "fixed"})


def switch(default: Any) -> Any:
    """A field that may change when a run continues, but not between nothing and something."""
    return dataclasses.field(default=default, metadata={"role": "switch"})


def derived(default: Any = dataclasses.MISSING) -> Any:
    """A field that the caller fills in from other settings; it is not a key of a config."""
    return dataclasses.field(default=default, metadata={"role": "derived"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighting:
    """The weight of a term at every step and every diffusion time, equation (1).

    Attributes:
        weight: The weight of the term. At 0 there is no such term.
        warmup_steps: The number of training steps over which the weight rises linearly from 0.
        stop_step: The share of the run after which the term stops; 1 for never. Once it has
            stopped, it costs no time.
        fall_off: The share of the run over which a term that stops fades out, along half a cosine.
            At 0 it stops at once. A fall-off over the whole run is `stop_step` 0 and `fall_off` 1.
        cosine_every: The number of steps between two measurements of the cosine between the
            gradients of the term and of the denoising loss, which the log shows as a moving
            average. A step that measures takes about half as long again. 0 for none.
        auto: Whether the term also stops once this average, after the warm-up, is below
            `auto_threshold`.
        auto_threshold: See `auto`.
        time_weighting: How the weight depends on the diffusion time, with alpha_bar the share of
            the signal that is kept: 'constant' does not, 'signal' is alpha_bar, 'snr' min(1, SNR),
            'noise' 1 - alpha_bar, and 'bell' 4 alpha_bar (1 - alpha_bar).
        steps: The number of steps of the run. Only `stop_step` and `fall_off` need it.
        dtype: The dtype of activations.
        share: A function from times t to their position between the clean end, 0, and the noisy
            end, 1. It is t / T for a process of T steps.
        alpha_bar: A function from times t to the kept signal alpha_bar_t in [0, 1].

    Raises:
        ValueError: A field is out of range; the message names the field.
    """

    weight: float = switch(1.0)
    warmup_steps: int = 500
    stop_step: float = 1.0
    fall_off: float = 0.0
    cosine_every: int = switch(0)
    auto: bool = False
    auto_threshold: float = 0.0
    time_weighting: str = "constant"
    steps: int = derived(0)
    dtype: DTypeLike = derived(jnp.float32)
    share: Callable[[Time], Float[Array, "batch"]] = derived()
    alpha_bar: Callable[[Time], Float[Array, "batch"]] = derived()

    def __post_init__(self):
        check_choices(self, time_weighting=TIME_WEIGHTINGS)
        check_range(self, 0, "must not be negative", "weight", "warmup_steps", "cosine_every")
        for name in ("stop_step", "fall_off"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}: it must lie in [0, 1], a share of the run"
                )
        if self.fall_off and not self.may_stop:
            raise ValueError(
                f"fall_off is {self.fall_off}: the term never stops; set stop_step below 1, or auto"
            )
        if self.auto and not self.cosine_every:
            raise ValueError("auto is True: it needs a cosine, set cosine_every to 50 or so")
        if (self.stop_step < 1 or self.fall_off) and not self.steps:
            raise ValueError("steps is 0: stop_step and fall_off are shares of it")

    @property
    def may_stop(self) -> bool:
        """Whether the term may stop before the end of the run."""
        return self.auto or self.stop_step < 1

    def time_weight(self, t: Time) -> Float[Array, "batch"]:
        """Returns weight * w(t), equation (2)."""
        alpha_bar = self.alpha_bar(t)
        if self.time_weighting == "signal":
            return self.weight * alpha_bar
        if self.time_weighting == "snr":
            # min(1, SNR) = min(1, a / (1 - a)), written without the division by zero at a = 1.
            return self.weight * alpha_bar / jnp.maximum(1 - alpha_bar, alpha_bar)
        if self.time_weighting == "noise":
            return self.weight * (1 - alpha_bar)
        if self.time_weighting == "bell":
            return self.weight * 4 * alpha_bar * (1 - alpha_bar)
        return self.weight * jnp.ones_like(alpha_bar)

    def warmup(self, step: Int[Array, ""]) -> Scalar:
        """Returns the factor in [0, 1] by which a rising weight is multiplied at a step."""
        return jnp.minimum(1.0, step / self.warmup_steps) if self.warmup_steps else jnp.ones(())

    def falling(self, step: Int[Array, ""], state: dict[str, Array]) -> Scalar:
        """Returns the factor in [0, 1] by which a falling weight is multiplied at a step.

        Args:
            step: The number of steps done.
            state: The state of the term, from `init_state` and `remember`.
        """
        if not self.may_stop:
            return jnp.ones(())
        begun = self.stop_step * self.steps if self.stop_step < 1 else jnp.inf
        if self.auto:
            begun = jnp.minimum(begun, state["stopped"])
        if not self.fall_off:
            return (step < begun).astype(jnp.float32)
        progress = jnp.clip((step - begun) / (self.fall_off * self.steps), 0, 1)
        # At the end this is exactly 0, and the term is left out.
        return jnp.where(progress < 1, (1 + jnp.cos(jnp.pi * progress)) / 2, 0.0)

    def init_state(self) -> dict[str, Scalar]:
        """Returns what a run has to store for the term; empty if no cosine is measured."""
        if not self.cosine_every:
            return {}
        # The moving average is cosine / counted, and nothing has stopped the term.
        return {"cosine": jnp.zeros(()), "counted": jnp.zeros(()), "stopped": jnp.full((), jnp.inf)}

    def measures(self, step: Int[Array, ""], state: dict[str, Array]) -> Bool[Array, ""]:
        """Whether the cosine (3) is measured at a step, for a term with `cosine_every`.

        Nothing is measured where the weight is 0, as at the first step of a warm-up.
        """
        due = step % self.cosine_every == 0
        return due & (self.falling(step, state) > 0) & (self.warmup(step) > 0)

    def remember(
        self, state: dict[str, Array], step: Int[Array, ""], cosine: Scalar
    ) -> dict[str, Scalar]:
        """Returns the state after a measurement of the cosine (3) at a step.

        Args:
            state: The state before.
            step: The number of steps done before this one.
            cosine: The cosine. It counts only where `measures(step, state)` says so.
        """
        counts = self.measures(step, state)
        after = {
            "cosine": _DECAY * state["cosine"] + (1 - _DECAY) * cosine,
            "counted": _DECAY * state["counted"] + (1 - _DECAY),
        }
        low = counts & (average(after) < self.auto_threshold) & (step >= self.warmup_steps)
        stops = low & jnp.isinf(state["stopped"]) & self.auto
        after["stopped"] = jnp.where(stops, step + 1.0, state["stopped"])
        return jax.tree.map(lambda new, old: jnp.where(counts, new, old), after, state)


def average(state: dict[str, Array]) -> Scalar:
    """Returns the moving average of the cosine (3); 0 before the first measurement."""
    return state["cosine"] / jnp.maximum(state["counted"], 1e-6)


def check_choices(settings: Any, **choices: tuple[str, ...]) -> None:
    """Raises ValueError for a field that is none of its choices."""
    for name, allowed in choices.items():
        if getattr(settings, name) not in allowed:
            raise ValueError(f"{name} is {getattr(settings, name)!r}: choose one of {allowed}")


def check_range(settings: Any, least: int, must: str, *names: str) -> None:
    """Raises ValueError for a field that is below `least`; `must` ends the message 'it ...'."""
    for name in names:
        if getattr(settings, name) < least:
            raise ValueError(f"{name} is {getattr(settings, name)}: it {must}")
