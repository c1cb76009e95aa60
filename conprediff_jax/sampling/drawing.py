"""Draws a batch as one jitted program, in parts that tell how far they are, or stage by stage.

    begin: noise, keys, condition -> walk: calls of the network -> end: points to images

All ways do the same operations in the same order. Parts are programs of their own, and the number
of calls in a part is an argument of its program, so no part is compiled twice. A part lasts about a
second, which leaves the device idle for less than a thousandth of its time. Callbacks from inside
one program would not: JAX keeps no program with a callback in its cache, and would compile it anew
in every process. Stages are parts of a given number whose points are looked at in between, so they
cost what it takes to decode the points; who does not ask for stages pays nothing.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key, Shaped, UInt8

from conprediff_jax import parallel
from conprediff_jax.diffusion.samplers import Known, Walk

Images = UInt8[Array, "batch height width channels"]
Points = Shaped[Array, "batch *point"]
Report = Callable[[int, int], None]

_SECONDS = 1.0  # length of a part, at most, unless one call of the network takes longer


class Begun(NamedTuple):
    """What is known of a batch before the network is called.

    Attributes:
        x_T: The points that sampling starts from.
        rngs: The keys of the steps.
        condition: The condition, as `DiffusionModel.encode_condition` returns it, for all steps.
        known: The part of the points that is known; None for no part.
        kept: What `end` needs besides the points.
    """

    x_T: Points
    rngs: Key[Array, "batch"]
    condition: Any
    known: Known | None = None
    kept: Any = None


class Stage(NamedTuple):
    """A batch on its way from noise to images.

    Attributes:
        done: Number of calls of the network so far.
        calls: Number of all calls.
        points: The points as they are, made visible; in the last stage the images themselves.
        estimate: The images that the network predicted in its last call; None before its first
            call, and for samplers without an estimate.
    """

    done: int
    calls: int
    points: Images
    estimate: Images | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """How a batch is drawn, as three functions to be traced.

    Attributes:
        begin: A function from params, frozen and further inputs of a batch to `Begun`.
        walk: A function from params and `Begun` to the way of the sampler.
        end: A function from frozen, `Begun` and the last points to images.
        mesh: The devices.
    """

    begin: Callable[..., Begun]
    walk: Callable[[Any, Begun], Walk]
    end: Callable[[Any, Begun, Points], Images]
    mesh: Mesh

    def whole(self) -> Callable[..., Images]:
        """One jitted function from params, frozen and further inputs to images."""

        def draw(params: Any, frozen: Any, *inputs: Any, **named: Any) -> Images:
            begun = self.begin(params, frozen, *inputs, **named)
            with divided(self.mesh, len(begun.rngs)):
                return self.end(frozen, begun, self.walk(params, begun).whole())

        return jax.jit(draw, out_shardings=parallel.replicated(self.mesh))

    def in_parts(self, report: Report) -> Callable[..., Images]:
        """A function with the arguments and the result of `whole`, for one process.

        Args:
            report: A function that is called after every part with the number of calls of the
                network that are done, and their number in all.
        """
        begin, advance = self._begin(), self._advance()

        def end(params: Any, frozen: Any, begun: Begun, carried: Any) -> Images:
            with divided(self.mesh, len(begun.rngs)):
                return self.end(frozen, begun, self.walk(params, begun).finish(carried))

        finish = jax.jit(end, out_shardings=parallel.replicated(self.mesh))

        def draw(params: Any, frozen: Any, *inputs: Any, **named: Any) -> Images:
            begun, carried = begin(params, frozen, *inputs, **named)
            calls = self._calls(params, begun)
            done, size = 0, 1
            while done < calls:
                started, last = time.monotonic(), min(done + size, calls)
                carried = jax.block_until_ready(advance(params, begun, carried, done, last))
                done = last
                report(done, calls)
                if time.monotonic() - started < _SECONDS / 2:
                    size *= 2
            return finish(params, frozen, begun, carried)

        return draw

    def in_stages(
        self, count: int, visible: Callable[[Any, Points], Images]
    ) -> Callable[..., Iterator[Stage]]:
        """A function with the arguments of `whole`, for one process, that yields stages.

        The first stage is the noise, and the last one has the result of `whole`.

        Args:
            count: Number of stages after the first, at equal distances as far as possible; there
                are fewer where the network is called less often.
            visible: A function from frozen and points on their way to images.
        """
        begin, advance = self._begin(), self._advance()

        def look(
            params: Any, frozen: Any, begun: Begun, carried: Any, last: bool
        ) -> tuple[Images, Images | None]:
            with divided(self.mesh, len(begun.rngs)):
                walk = self.walk(params, begun)
                points, estimate = walk.finish(carried), None
                if walk.estimate:
                    estimate = self.end(frozen, begun, walk.estimate(carried))
                if last:
                    return self.end(frozen, begun, points), estimate
                return visible(frozen, points), estimate

        show = jax.jit(look, static_argnames="last", out_shardings=parallel.replicated(self.mesh))

        def draw(params: Any, frozen: Any, *inputs: Any, **named: Any) -> Iterator[Stage]:
            begun, carried = begin(params, frozen, *inputs, **named)
            calls = self._calls(params, begun)
            points, _ = show(params, frozen, begun, carried, last=False)
            yield Stage(0, calls, points, None)
            ends = np.unique(np.round(np.linspace(0, calls, count + 1)).astype(int))
            for first, last in itertools.pairwise(ends.tolist()):
                carried = advance(params, begun, carried, first, last)
                yield Stage(last, calls, *show(params, frozen, begun, carried, last=last == calls))

        return draw

    def _begin(self) -> Callable[..., tuple[Begun, Any]]:
        """A jitted function from the arguments of `begin` to its result and the walk's start."""

        @jax.jit
        def begin(params: Any, frozen: Any, *inputs: Any, **named: Any) -> tuple[Begun, Any]:
            begun = self.begin(params, frozen, *inputs, **named)
            with divided(self.mesh, len(begun.rngs)):
                return begun, self.walk(params, begun).start

        return begin

    def _advance(self) -> Callable[..., Any]:
        """A jitted function that goes a part of the walk; see `Walk.part`."""

        def part(params: Any, begun: Begun, carried: Any, first: Any, last: Any) -> Any:
            with divided(self.mesh, len(begun.rngs)):
                return self.walk(params, begun).part(carried, first, last)

        return jax.jit(part, donate_argnums=2)

    def _calls(self, params: Any, begun: Begun) -> int:
        """Number of calls of the network."""
        rows = jax.eval_shape(lambda: self.walk(params, begun).rows)
        return len(jax.tree.leaves(rows)[0])


def divided(mesh: Mesh, count: int) -> AbstractContextManager[None]:
    """The context in which a batch of `count` images stays divided over the devices."""
    # With guidance, a batch holds the predictions with and without the condition.
    return parallel.divided_batch(mesh, count, 2 * count)
