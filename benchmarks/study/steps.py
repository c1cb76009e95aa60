"""Times programs in turn, and makes train steps on random data for it."""

import functools
import statistics
import time
from collections.abc import Mapping
from typing import Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from conprediff_jax import parallel
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.config.vocabulary import with_any_vocabulary
from conprediff_jax.planning import programs
from conprediff_jax.tasks.state import init_state
from conprediff_jax.xla.cost import program_cost
from conprediff_jax.xla.hlo import Module


class Timed(Protocol):
    """A program that can be timed.

    Attributes:
        seconds: Seconds of every run so far.
    """

    seconds: list[float]

    def run(self) -> None:
        """Runs the program once and appends its time to `seconds`."""


def time_in_turn(timed: Mapping[str, Timed], rounds: int, *, warm_up: int) -> dict[str, float]:
    """Median seconds of programs that run in turn; the first `warm_up` rounds do not count."""
    for _ in range(warm_up + rounds):
        for program in timed.values():
            program.run()
    return {name: statistics.median(p.seconds[-rounds:]) for name, p in timed.items()}


class TimedStep:
    """The compiled train step of a config, and the state that it advances.

    Attributes:
        experiment: The objects of the config.
        state: The train state, which every step replaces.
        batch: Random bytes, numbers or labels, the same for every step.
        seconds: Seconds of every step so far.
    """

    def __init__(self, config: ConfigDict):
        self.experiment = make_experiment(with_any_vocabulary(config))
        mesh = parallel.make_mesh(self.experiment.mesh)
        task, optimizer = self.experiment.task, self.experiment.optimizer
        abstract = programs.train_state(self.experiment, mesh)
        self.state = init_state(task, optimizer.make(self.experiment.train.steps), abstract)
        rng = np.random.default_rng(0)
        self.batch = {
            name: jax.device_put(_random(rng, leaf, task.num_classes), leaf.sharding)
            for name, leaf in programs.abstract_batch(self.experiment, mesh).items()
        }
        self._step = programs.lower_train_step(self.experiment, mesh).compile()
        self.seconds: list[float] = []

    @functools.cached_property
    def flops(self) -> float:
        """FLOPs of a step on one device, with every round of a loop counted."""
        return program_cost(Module(self._step.as_text())).flops

    def run(self) -> None:
        """Takes one step and appends its time to `seconds`."""
        began = time.perf_counter()
        self.state, metrics = self._step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        self.seconds.append(time.perf_counter() - began)


def _random(
    rng: np.random.Generator, leaf: jax.ShapeDtypeStruct, num_classes: int | None
) -> np.ndarray:
    if np.issubdtype(leaf.dtype, np.floating):
        return rng.normal(size=leaf.shape).astype(leaf.dtype)
    limit = 256 if leaf.dtype == np.uint8 else num_classes or 1
    return rng.integers(0, limit, leaf.shape, leaf.dtype)
