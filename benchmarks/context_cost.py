"""What the context loss costs: time, FLOPs, bytes and memory of its value and gradient.

    python benchmarks/context_cost.py [--tpu=v5e:2x2] [--out=runs/context_cost]

Each variant changes one thing of a base: one stride, Q = 8, 4 channels, every point of a 16 x 16
grid, the distribution decoder, Sinkhorn. Two more variants are the same loss written naively, with
ott's `PointCloud` mapped over the leading axis: one iterates until it converges, and one takes the
base's number of iterations, so that only the layout differs. All columns but ms, error and cosine
are ratios to the base.

Programs are timed in turn, round after round, and the medians are compared, so that a busy machine
slows all of them alike. FLOPs and bytes are read from the compiled programs, with every round of a
loop counted (`xla.cost`); loops of unknown length, marked by `+`, count once. The naive loss until
convergence is counted with as many iterations as the hardest of the random problems below needs,
without the tests of convergence. With `--tpu`, the same programs are also compiled for a TPU chip
that you need not have.

A second table has the transports alone, with their values and gradients, since the decoder moves
most of the bytes of the whole loss, whatever the transport is.

error, cosine    of the transport, on 512 random problems: mean error of the distance relative
                 to exact matching by SciPy's `linear_sum_assignment`, and the cosine between the
                 gradients
"""

import dataclasses
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from ott.geometry import pointcloud
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn as ott_sinkhorn
from scipy import optimize
from study import cost_report
from study.cost_report import ALONE, BASE, FIXED, NAIVE

from conprediff_jax.cli import app
from conprediff_jax.common.files import write_text
from conprediff_jax.common.progress import Progress
from conprediff_jax.context import TRANSPORTS, ContextPrediction
from conprediff_jax.planning.topology import Topology
from conprediff_jax.xla.cost import program_cost
from conprediff_jax.xla.hlo import Module

_TPU = flags.DEFINE_string("tpu", None, "Also compile for one chip of this slice, as v5e:2x2.")
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Timed calls of every program.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 16, "Examples of a timed call.", lower_bound=1)
_TPU_BATCH = flags.DEFINE_integer("tpu_batch", 256, "Examples for the TPU.", lower_bound=1)
_GRID = flags.DEFINE_integer("grid", 16, "Points on a side of an example.", lower_bound=10)
_FEATURES = flags.DEFINE_integer("features", 64, "Channels that the decoder reads.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "runs/context_cost", "Folder for the JSON file and the plot.")

_PROBLEMS = 512
_CHANNELS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One program.

    Attributes:
        channels: Number of channels of the points.
        options: Fields of `ContextPrediction` that differ from the base, as (name, value).
    """

    channels: int = _CHANNELS
    options: tuple[tuple[str, Any], ...] = ()

    @functools.cached_property
    def term(self) -> ContextPrediction:
        """The loss."""
        options = {"strides": (1,), **dict(self.options)}
        return ContextPrediction(
            share=lambda t: t / 1000, alpha_bar=lambda t: jnp.ones(t.shape), **options
        )

    def arguments(self, batch: int) -> tuple[Any, ...]:
        """The arguments: parameters, features, clean points, times and keys."""
        size = _GRID.value
        h, x_0, when, params, keys = jax.random.split(jax.random.key(0), 5)
        features, channels = _FEATURES.value, self.channels
        return (
            self.term.init(params, features=features, channels=channels),
            jax.random.normal(h, (batch, size, size, features)),
            jax.random.normal(x_0, (batch, size, size, channels)),
            jax.random.randint(when, (batch,), 0, 1000),
            jax.random.split(keys, batch),
        )

    def program(self) -> Callable[..., Any]:
        """The value of the loss and its gradient by the parameters and by the features."""

        def loss(params, h, x_0, t, keys):
            return self.term.loss(params, h, x_0, t, keys).weighted.mean()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def variant(channels: int = _CHANNELS, **options: Any) -> Variant:
    """A variant from keyword arguments."""
    return Variant(channels=channels, options=tuple(options.items()))


VARIANTS = {
    BASE: variant(),
    **{f"stride {s}": variant(strides=(s,)) for s in (2, 3, 4)},
    "strides 1, 2, 3": variant(strides=(1, 2, 3)),
    **{f"direct, stride {s}": variant(decoder="direct", strides=(s,)) for s in (1, 2, 3, 4)},
    **{f"Q {q}": variant(samples=q) for q in (4, 16, 32)},
    **{f"{c} channels": variant(channels=c) for c in (16, 64)},
    **{f"{p} points": variant(points_per_example=p) for p in (16, 64)},
    "exact": variant(transport="exact"),
    "divergence": variant(transport="sinkhorn_divergence"),
    "gaussian": variant(transport="gaussian"),
    FIXED: variant(transport="naive_20"),
    NAIVE: variant(transport="naive"),
}


def naive(y: jax.Array, t: jax.Array, *, iterations: int | None = None) -> jax.Array:
    """The transport as one would first write it.

    Args:
        y: Predicted points, `[..., Q, C]`.
        t: Target points, `[..., Q, C]`.
        iterations: Number of iterations; None for ott's default, a threshold on the error of the
            marginals.

    Returns:
        Distances `[...]`.
    """

    def distance(y, t):
        points, solved = _solve(y, t, iterations)
        return (jax.lax.stop_gradient(solved.matrix) * points.cost_matrix).sum()

    flat = (x.reshape(-1, *x.shape[-2:]) for x in (y, t))
    return jax.vmap(distance)(*flat).reshape(y.shape[:-2])


def hardest() -> int:
    """Number of iterations in which ott's default solves all of the random problems."""
    y, t = _random_problems(variant())
    return int(jax.jit(jax.vmap(lambda y, t: _solve(y, t, None)[1].n_iters))(y, t).max())


def _solve(y: jax.Array, t: jax.Array, iterations: int | None) -> tuple[Any, Any]:
    fixed = {}
    if iterations:
        fixed = {"min_iterations": iterations, "max_iterations": iterations, "threshold": -1.0}
    y, t = y / y.shape[-1] ** 0.5, t / t.shape[-1] ** 0.5
    epsilon = 0.05 * jax.lax.stop_gradient(pointcloud.PointCloud(y, t).cost_matrix.mean())
    points = pointcloud.PointCloud(y, t, epsilon=epsilon)
    return points, ott_sinkhorn.Sinkhorn(**fixed)(linear_problem.LinearProblem(points))


def _random_problems(program: Variant) -> Any:
    rng = np.random.default_rng(0)
    shape = (2, _PROBLEMS, program.term.samples, program.channels)
    return rng.normal(size=shape).astype(np.float32)


class Timed:
    """A program and the seconds that its calls took. The first call compiles it."""

    def __init__(self, program: Variant):
        self._arguments = program.arguments(_BATCH.value)
        self._step = program.program()
        self.seconds: list[float] = []

    def run(self) -> None:
        """Runs the program once and appends its time to `seconds`."""
        began = time.perf_counter()
        jax.block_until_ready(self._step(*self._arguments))
        self.seconds.append(time.perf_counter() - began)


def costs(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """FLOPs, bytes, temporary memory and unknown loops of a compiled program."""
    module = Module(compiled.as_text())
    cost = program_cost(module)
    return {
        "FLOPs": cost.flops,
        "bytes": cost.bytes,
        "memory": compiled.memory_analysis().temp_size_in_bytes,
        "unknown_loops": len(module.unknown_loops),
        "xla_bytes": compiled.cost_analysis().get("bytes accessed", 0.0),
    }


def loss_costs(program: Variant, batch: int, device: jax.Device) -> dict[str, Any]:
    """The costs of the whole loss on a device, which need not exist."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    structs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(lambda: program.arguments(batch)),
    )
    return costs(program.program().lower(*structs).compile())


def transport_costs(program: Variant, batch: int, device: jax.Device) -> dict[str, Any]:
    """The costs of the transport alone, value and gradient, for as many problems as in the loss."""
    shape = (batch, _GRID.value**2, program.term.samples, program.channels)
    sharding = jax.sharding.SingleDeviceSharding(device)
    points = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    step = jax.jit(jax.value_and_grad(lambda y, t: program.term.distance(y, t).mean()))
    return costs(step.lower(points, points).compile())


def accuracy(program: Variant) -> tuple[float, float]:
    """Relative error of the distance and cosine of the gradient, both against exact matching."""
    return _accuracy(program.term.transport, program.term.samples, program.channels)


@functools.cache
def _accuracy(transport: str, samples: int, channels: int) -> tuple[float, float]:
    program = variant(channels, transport=transport, samples=samples)
    y, t = _random_problems(program)
    found = np.asarray(program.term.distance(y, t))
    gradient = np.asarray(jax.grad(lambda y: program.term.distance(y, t).sum())(y)).reshape(
        _PROBLEMS, -1
    )
    exact, slopes = np.empty(_PROBLEMS), np.empty_like(gradient)
    for index, (one, other) in enumerate(zip(y, t, strict=True)):
        cost = np.square(one[:, None] - other[None]).mean(-1)
        rows, columns = optimize.linear_sum_assignment(cost)
        exact[index] = cost[rows, columns].mean()
        slopes[index] = 2 * (one - other[columns]).ravel() / one.size
    cosine = (gradient * slopes).sum(1) / (
        np.linalg.norm(gradient, axis=1) * np.linalg.norm(slopes, axis=1)
    )
    return float(np.abs(found - exact).mean() / exact.mean()), float(cosine.mean())


def main(argv: list[str]) -> None:
    """Compiles, times, and prints the table."""
    del argv
    app.need("matplotlib", "plan")
    TRANSPORTS["naive"] = naive
    TRANSPORTS["naive_20"] = functools.partial(naive, iterations=20)
    rounds = hardest()
    TRANSPORTS["naive_counted"] = functools.partial(naive, iterations=rounds)
    found = _compile()
    out = pathlib.Path(_OUT.value)
    _write(out, found, rounds)  # compiling for TPUs takes long
    for name, seconds in _time().items():
        found[name]["seconds"] = seconds
    _write(out, found, rounds)
    print(cost_report.markdown(found, rounds, _TPU.value))
    cost_report.plot(found, _TPU.value, out / "context_cost.png")
    logging.info("%s, context_cost.png", out / "context_cost.json")


def _write(out: pathlib.Path, found: dict[str, dict], rounds: int) -> None:
    about = {"backend": jax.default_backend(), "tpu": _TPU.value, "batch": _BATCH.value,
             "tpu_batch": _TPU_BATCH.value, "grid": _GRID.value, "features": _FEATURES.value,
             "rounds": _ROUNDS.value, "iterations to convergence": rounds}  # fmt: skip
    write_text(out / "context_cost.json", json.dumps(about | {"programs": found}, indent=1) + "\n")


def _compile() -> dict[str, dict]:
    """The accuracy of every program, and its costs here and, with --tpu, on a TPU."""
    places = {"here": (_BATCH.value, jax.devices()[0])}
    if _TPU.value:
        places["tpu"] = (_TPU_BATCH.value, Topology.parse(_TPU.value).devices()[0])
    found, progress = {}, Progress(len(VARIANTS))
    for number, (name, program) in enumerate(VARIANTS.items(), 1):
        error, cosine = None, None
        if program.term.decoder == "distribution":
            error, cosine = accuracy(program)
        counted = variant(transport="naive_counted") if name == NAIVE else program
        found[name] = {"error": error, "cosine": cosine}
        found[name] |= {place: loss_costs(counted, *at) for place, at in places.items()}
        if name in ALONE:
            alone = {place: transport_costs(counted, *at) for place, at in places.items()}
            found[name]["alone"] = alone
        left = progress.left(progress.mark(number))
        logging.info("%s: compiled, %d/%d  %s left", name, number, len(VARIANTS), left)
    return found


def _time() -> dict[str, float]:
    """Median seconds of every program, timed in turn; the first round does not count."""
    timed = {name: Timed(program) for name, program in VARIANTS.items()}
    progress = Progress(_ROUNDS.value + 1)
    for number in range(1, _ROUNDS.value + 2):
        for program in timed.values():
            program.run()
        left = progress.left(progress.mark(number))
        logging.info("round %d/%d  %s left", number, _ROUNDS.value + 1, left)
    return {name: statistics.median(program.seconds[1:]) for name, program in timed.items()}


if __name__ == "__main__":
    app.run(main)
