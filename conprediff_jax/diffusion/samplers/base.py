"""What the samplers share: the times that they visit, and one linear update.

A sampler visits times t_0 > t_1 > ... of the process. At each it calls the network once, and moves
from x_t to x_s, where s < t is the next time that it visits, or the clean end. The steps of all
samplers have the form

    x_s = c_x x_t + c_0 x0_hat + c_e epsilon_hat + c_p x0_hat' + c_q epsilon_hat' + c_n z (1)

with z standard normal, and with the estimates x0_hat' and epsilon_hat' of the previous call. So a
sampler is a table of coefficients, which is computed once in float64 and run by one `lax.scan` in
float32.

DDPM, DDIM, DPM-Solver++ and RePaint are written for processes that keep the variance of the data.
For another process with additive noise their tables hold for x_t / r(t), where r is
`AdditiveNoise.length`, and `Coefficients.scaled` turns them into tables for x_t.

Where a part of the clean points is known, that part of x_t is drawn anew from q(x_t | x_0) before
every call of the network, and the rest is sampled:

    x_t <- mask (signal(t) x_0 + noise(t) z') + (1 - mask) x_t                            (2)

The known part is replaced as in Song et al. 2021, "Score-Based Generative Modeling through
Stochastic Differential Equations" (arXiv 2011.13456), section 5.

The spacings are those of Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are
Flawed" (arXiv 2305.08891), table 2.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Float64, Int, Int64, Key, Real, Shaped

from conprediff_jax.common.errors import FieldError
from conprediff_jax.diffusion.additive import AdditiveNoise, Points
from conprediff_jax.diffusion.process import Time
from conprediff_jax.diffusion.times import TableTimes

SPACINGS = ("leading", "trailing", "linspace")
CONTINUOUS_SPACINGS = ("trailing", "linspace")

# The first time visited must be at least this share of T, since sampling starts from noise alone.
NOISY_END = 2 / 3

Denoise = Callable[[Array, Array], Array]
StepTable = Float64[np.ndarray, "steps"]


class Coefficients(NamedTuple):
    """The table of eq. (1), one entry per step. A term that a sampler does not have is None."""

    x_t: StepTable | None = None
    x_0: StepTable | None = None
    epsilon: StepTable | None = None
    previous_x_0: StepTable | None = None
    previous_epsilon: StepTable | None = None
    noise: StepTable | None = None

    def scaled(self, start: StepTable, end: StepTable) -> "Coefficients":
        """Returns the table for x_t, given that of x_t / r(t).

        Args:
            start: r at the time of each call.
            end: r at the time where its step ends.
        """
        return Coefficients(
            None if self.x_t is None else end / start * self.x_t,
            *(None if column is None else end * column for column in self[1:]),
        )


class Walk(NamedTuple):
    """The way of a sampler from noise to the sample, one call of the network after the other.

    Attributes:
        start: What is carried from step to step, before the first one.
        rows: A tree of arrays with one row for every step.
        step: A function `(carried, row) -> carried` that calls the network once.
        finish: A function from what the last step returns to the sample. After an earlier step, it
            returns the points or tokens as they are by then.
        estimate: A function from what a step returns to the clean points that the network has
            predicted in it; None for samplers without such an estimate.
    """

    start: Any
    rows: Any
    step: Callable[[Any, Any], Any]
    finish: Callable[[Any], Array]
    estimate: Callable[[Any], Array] | None = None

    def whole(self) -> Array:
        """Goes all the way. Call it under `jit`; the network is then compiled once."""
        carried, _ = jax.lax.scan(lambda x, row: (self.step(x, row), None), self.start, self.rows)
        return self.finish(carried)

    def part(self, carried: Any, first: Int[ArrayLike, ""], last: Int[ArrayLike, ""]) -> Any:
        """Goes from before step `first` to before step `last`, which may be traced numbers."""

        def step(index: Int[Array, ""], carried: Any) -> Any:
            row = jax.tree.map(lambda column: jnp.asarray(column)[index], self.rows)
            return self.step(carried, row)

        return jax.lax.fori_loop(first, last, step, carried)


class Known(NamedTuple):
    """The part of the clean data that is known.

    Attributes:
        x_0: Clean points or tokens. Where they are not known, any finite values.
        mask: True where the points or tokens are known.
    """

    x_0: Shaped[Array, "batch *point"]
    mask: Bool[Array, "batch *point"]

    def into(self, x: Array, values: Array | None = None) -> Array:
        """Replaces the known part of `x` with `values`; None means the clean data."""
        return jnp.where(self.mask, self.x_0 if values is None else values, x)


def step_noise(
    rngs: Key[Array, "batch"], step: int | Int[Array, ""], shape: tuple[int, ...]
) -> Float[Array, "batch ..."]:
    """Draws the standard normal noise z of one step.

    Args:
        rngs: One key per example. The noise of an example depends on its key and the step only.
        step: The index of the step, counted from 0 at the noisy end.
        shape: The shape of one example.

    Returns:
        `[batch, *shape]`, float32.
    """
    return jax.vmap(
        lambda rng: jax.random.normal(jax.random.fold_in(rng, step), shape, jnp.float32)
    )(rngs)


def spaced_times(
    num_steps: int,
    steps: int,
    spacing: str,
    steps_offset: int = 0,
    skip_first: bool = False,
    time_limit: int | None = None,
) -> Int64[np.ndarray, "steps"]:
    """Lists the times that a sampler visits, in decreasing order.

    Args:
        num_steps: T of the process.
        steps: The number of times to visit. It need not divide T.
        spacing: 'leading' is the multiples of `T // steps` from 0 upwards, plus `steps_offset`.
            'trailing' is the multiples of `T / steps` from T downwards, rounded, minus 1.
            'linspace' is equally spaced from 0 to T-1, both included, and rounded.
        steps_offset: See 'leading'.
        skip_first: Whether 'leading' and 'linspace' are computed for one more time, of which the
            smallest is left out.
        time_limit: Takes the place of T, except in the `T / steps` of 'trailing'. None means T.

    Returns:
        `[steps]`, int64. There are fewer where 'trailing' starts at a lower limit and reaches 0
        early.
    """
    limit = num_steps if time_limit is None else time_limit
    points = np.arange(steps + skip_first)
    if spacing == "trailing":
        # With products instead of `arange`, some ties would round differently. `arange` may have a
        # value too many, near 0, which the slice removes.
        down = np.arange(limit, 0, -num_steps / steps)[:steps]
        return np.round(down).astype(np.int64) - 1
    if spacing == "leading":
        times = points * (limit // len(points)) + steps_offset
    else:
        times = np.round(np.linspace(0, limit - 1, len(points))).astype(np.int64)
    return times[int(skip_first) :][::-1].copy()


def continuous_times(steps: int, spacing: str, last_share: float) -> Float64[np.ndarray, "steps"]:
    """Lists the shares of times that a sampler of continuous time visits, in decreasing order.

    Args:
        steps: The number of times to visit.
        spacing: 'trailing' is equally spaced from the noisy end, 1, so that the last step to the
            clean end is as large as the others. 'linspace' is equally spaced from 1 to
            `last_share`, both included.
        last_share: See 'linspace'.
    """
    if spacing == "trailing":
        return 1 - np.arange(steps) / steps
    return np.linspace(1, last_share, steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler(abc.ABC):
    """Base of the samplers of processes with additive noise.

    Attributes:
        process: The process, which interprets the network's output and has the schedule.
        steps: The number of steps, in 1 .. T for a process of T steps.
        spacing: 'leading', 'trailing' or 'linspace'; see `spaced_times`. In continuous time
            'trailing' or 'linspace'; see `continuous_times`.
        steps_offset: A number that is added to every time of 'leading'.
        clip: The limit of x_0 estimates, [-clip, clip], for data with such limits. The estimate of
            epsilon is adapted, so that eq. (1) of the process still holds. None means no limit.
        time_limit: All times visited are below it, as with the smallest lambda of DPM-Solver. None
            means T. Only for a process of T steps.

    Raises:
        ValueError: A field is outside its choices or range, or the first time visited is far from
            the noisy end, where sampling starts; the message names the field.
    """

    process: AdditiveNoise
    steps: int
    spacing: str = "leading"
    steps_offset: int = 0
    clip: float | None = None
    time_limit: int | None = None

    def __post_init__(self):
        spacings = SPACINGS if self.has_table else CONTINUOUS_SPACINGS
        if self.spacing not in spacings:
            raise FieldError("spacing", f"is {self.spacing!r}; choose one of {', '.join(spacings)}")
        if self.clip is not None and self.clip <= 0:
            raise FieldError("clip", f"is {self.clip}; it must be positive, or None for no limit")
        if self.has_table:
            self._check_table()
        elif self.steps < 1:
            raise FieldError("steps", f"is {self.steps}; it must be at least 1")
        elif self.time_limit is not None or self.steps_offset:
            name = "steps_offset" if self.steps_offset else "time_limit"
            raise FieldError(
                name, f"is {getattr(self, name)}: a process in continuous time has no such limit"
            )

    def _check_table(self) -> None:
        """Raises ValueError unless the fields fit the steps of the process."""
        if not 1 <= self.steps <= self.process.num_steps:
            raise FieldError(
                "steps",
                f"is {self.steps}; it must lie in 1 .. {self.process.num_steps}, the "
                "process's num_steps",
            )
        if self.steps_offset and self.spacing != "leading":
            raise FieldError(
                "steps_offset",
                f"is {self.steps_offset} with spacing {self.spacing!r}; "
                "it belongs to 'leading' and must be 0 otherwise",
            )
        if self.time_limit is not None and not 1 <= self.time_limit <= self.process.num_steps:
            raise FieldError(
                "time_limit",
                f"is {self.time_limit}; it must lie in 1 .. {self.process.num_steps}, "
                "the process's num_steps, or be None",
            )
        self._check_times()

    def _check_times(self) -> None:
        """Raises ValueError unless there are `steps` times, and the first one is noisy enough."""
        times, last = self.times, self.process.num_steps - 1
        if len(times) < self.steps:
            raise FieldError(
                "steps",
                f"is {self.steps} with time_limit {self.time_limit}: 'trailing' visits only "
                f"{len(times)} times below it; raise either, or choose 'linspace'",
            )
        if times[0] > last or times[-1] < 0 or np.any(np.diff(times) >= 0):
            raise FieldError(
                "steps",
                f"is {self.steps} with steps_offset {self.steps_offset}: the times visited are "
                f"{times[0]} .. {times[-1]}; they must differ and lie in 0 .. {last}: lower either",
            )
        if times[0] + 1 < NOISY_END * (last + 1):
            raise FieldError(
                "steps",
                f"is {self.steps} with spacing {self.spacing!r}: sampling starts from noise "
                f"alone, and the first time visited would be {times[0]} of 0 .. {last}, where much "
                "of the signal is left; choose spacing 'trailing', or other steps",
            )

    @property
    def has_table(self) -> bool:
        """Whether the process has T steps, and not continuous time."""
        return isinstance(self.process, TableTimes)

    @property
    def times(self) -> Real[np.ndarray, "steps"]:
        """The times visited, decreasing, `[steps]`: int64, or float64 in continuous time."""
        if not self.has_table:
            shares = continuous_times(self.steps, self.spacing, self.process.last_share)
            return self.process.time_at(shares)
        return spaced_times(
            self.process.num_steps,
            self.steps,
            self.spacing,
            self.steps_offset,
            time_limit=self.time_limit,
        )

    @property
    def call_times(self) -> Real[np.ndarray, "calls"]:
        """The time of every call of the network, in order. Here every time is visited once."""
        return self.times

    @property
    def num_model_calls(self) -> int:
        """The number of calls of the network by `sample`."""
        return len(self.call_times)

    @property
    def start_scale(self) -> float:
        """The factor by which the points that sampling starts from are multiplied."""
        return 1.0

    @abc.abstractmethod
    def coefficients(self) -> Coefficients:
        """Returns the table of eq. (1), float64, with one entry for every call of the network."""

    def alpha_bar_steps(self) -> tuple[StepTable, StepTable]:
        """Returns `alpha_bar` at the start and the end of every step; the last ends at 1."""
        start = self.process.alpha_bar(self.times)
        return start, np.append(start[1:], 1.0)

    def length_steps(self) -> tuple[StepTable, StepTable]:
        """Returns `length` at the start and the end of every step; the last ends at 1."""
        start = self.process.length(self.times)
        return start, np.append(start[1:], 1.0)

    def estimate(self, output: Points, x_t: Points, t: Time) -> tuple[Points, Points]:
        """Returns estimates of x_0 and epsilon, where x_0 is limited to [-clip, clip]."""
        x_0, epsilon = self.process.to_x0_and_epsilon(output, x_t, t)
        if self.clip is None:
            return x_0, epsilon
        x_0 = jnp.clip(x_0, -self.clip, self.clip)
        return x_0, self.process.to_epsilon(x_0, x_t, t)

    def sample(
        self,
        denoise: Denoise,
        x_T: Points,
        rngs: Key[Array, "batch"],
        known: Known | None = None,
    ) -> Points:
        """Runs the reverse process. Call it under `jit`; the network is then compiled once.

        Args:
            denoise: The network, a function from `x_t [batch, *grid, channels]`, float32, and
                `t [batch]`, in the process's `time_dtype`, to an output of the shape of x_t.
            x_T: The points to start from, drawn by `process.prior` with one key per example, and
                with other keys than `rngs`.
            rngs: One key per example, for the noise of the steps (`step_noise`). The result of an
                example depends on its own key, and not on the other examples of the batch.
            known: The part of the sample that is given, eq. (2), or None.

        Returns:
            The sample, in the shape of `x_T`, float32, not clipped. Its known part is `known.x_0`.
        """
        return self.walk(denoise, x_T, rngs, known).whole()

    def walk(
        self,
        denoise: Denoise,
        x_T: Points,
        rngs: Key[Array, "batch"],
        known: Known | None = None,
    ) -> Walk:
        """The reverse process step by step; `sample` explains the arguments."""
        calls = self.num_model_calls
        table = jax.tree.map(lambda column: column.astype(np.float32), self.coefficients())
        x_T = x_T.astype(jnp.float32)
        if self.start_scale != 1:
            x_T = self.start_scale * x_T

        def step(carried, row):
            x_t, *previous = carried
            index, time, c = row
            t = jnp.full(x_t.shape[:1], time)
            if known is not None:  # eq. (2), with noise of its own
                z = step_noise(rngs, calls + index, x_t.shape[1:])
                x_t = known.into(x_t, self.process.add_noise(known.x_0, z, t))
            x_0, epsilon = self.estimate(denoise(x_t, t), x_t, t)
            z = None if c.noise is None else step_noise(rngs, index, x_t.shape[1:])
            terms = zip(c, (x_t, x_0, epsilon, *previous, z), strict=True)
            x_s = sum(scale * term for scale, term in terms if scale is not None)  # eq. (1)
            return x_s, x_0, epsilon if c.previous_epsilon is not None else None

        def given(x):
            return x if known is None else known.into(x)

        rows = (jnp.arange(calls), self.call_times.astype(self.process.time_dtype), table)
        zero = jnp.zeros_like(x_T)
        start = (x_T, zero, zero if table.previous_epsilon is not None else None)
        return Walk(
            start, rows, step, lambda carried: given(carried[0]), lambda carried: given(carried[1])
        )
