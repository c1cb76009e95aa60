"""Tables, verdicts and a picture of the cost of the context loss: see `context_cost.py`.

`found[name]` is the entry of a program by its name there, with the keys

    error, cosine   of its transport against exact matching; None for the direct decoder
    seconds         seconds of a call here
    here, tpu       FLOPs, bytes, memory and unknown_loops; `tpu` only if it was compiled for one
    alone           `here` and `tpu` of the transport without the decoder; for names in `ALONE`
"""

import pathlib
from typing import Any

import jax

from conprediff_jax.planning import tables

BASE, FIXED, NAIVE = "base", "naive, 20 iterations", "naive, to convergence"
ALONE = (BASE, "exact", "divergence", "gaussian", FIXED, NAIVE)
GOAL = 10  # the naive transport should move at least this many times the bytes
_PARTS = ("FLOPs", "bytes", "memory")
Found = dict[str, dict[str, Any]]


def markdown(found: Found, rounds: int, tpu: str | None) -> str:
    """Both tables, and whether the goals are met.

    Args:
        found: The entries of all programs.
        rounds: Number of iterations in which the naive loss converges.
        tpu: The slice for whose chips programs were compiled too, or None.
    """
    verdicts = "\n".join(_verdicts(found, rounds, tpu))
    return "\n\n".join([_table(found, tpu), "Transports alone:", _alone(found, tpu), verdicts])


def plot(found: Found, tpu: str | None, path: pathlib.Path) -> None:
    """Plots FLOPs and bytes over the stride, and time and error of the transports."""
    from matplotlib.figure import Figure

    side = "tpu" if tpu else "here"
    where = f"compiled for {tpu}" if tpu else jax.default_backend()
    canvas = Figure(figsize=(14, 4), layout="constrained")
    flops, moved, spread = canvas.subplots(1, 3)
    strides = {
        "distribution": [BASE, "stride 2", "stride 3", "stride 4"],
        "direct": [f"direct, stride {s}" for s in (1, 2, 3, 4)],
    }
    for panel, part, unit in ((flops, "FLOPs", 1e9), (moved, "bytes", 1e6)):
        for decoder, names in strides.items():
            values = [found[name][side][part] / unit for name in names]
            panel.plot(range(1, 5), values, marker="o", label=f"{decoder} decoder")
        panel.set(xlabel="stride", xticks=range(1, 5), ylim=(0, None))
        panel.set(title=f"{'GFLOP' if part == 'FLOPs' else 'MB moved'}, {where}")
        panel.legend()
    times = [found[name]["seconds"] / found[BASE]["seconds"] for name in ALONE]
    bars = spread.barh(["sinkhorn", *ALONE[1:]], times, color="#2563a8")
    said = [f"error {100 * found[name]['error']:.1f} %" for name in ALONE]
    spread.bar_label(bars, said, padding=4, fontsize=8)
    spread.set(xscale="log", xlim=(min(times) / 2, 6 * max(times)))
    spread.invert_yaxis()
    spread.set(title=f"time relative to Sinkhorn, {jax.default_backend()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=130)


def _table(found: Found, tpu: str | None) -> str:
    header = ["loss", "ms", "time", *_cost_header(tpu), "error", "cosine"]
    rows, base = [], found[BASE]
    for name, one in found.items():
        row = [name, f"{1e3 * one['seconds']:.1f}", f"{one['seconds'] / base['seconds']:.2f}"]
        row += _cost_cells(one, base)
        has = one["error"] is not None
        row += [f"{100 * one['error']:.1f} %", f"{one['cosine']:.3f}"] if has else ["", ""]
        rows.append(row)
    return tables.markdown(rows, header)


def _alone(found: Found, tpu: str | None) -> str:
    base = found[BASE]["alone"]
    rows = [[name, *_cost_cells(found[name]["alone"], base)] for name in ALONE]
    return tables.markdown(rows, ["transport", *_cost_header(tpu)])


def _sides(tpu: str | None) -> dict[str, str]:
    """The places that programs were compiled for, with their titles."""
    sides = {"here": jax.default_backend().upper()}
    return sides | ({"tpu": f"TPU {tpu}"} if tpu else {})


def _cost_header(tpu: str | None) -> list[str]:
    return [f"{part}, {name}" for name in _sides(tpu).values() for part in _PARTS]


def _cost_cells(one: dict, base: dict) -> list[str]:
    """FLOPs, bytes and memory of a program for every place, relative to the base."""
    cells = []
    for side in ("here", "tpu"):
        if side in one:
            mark = "+" if one[side]["unknown_loops"] else ""
            for part in ("FLOPs", "bytes"):
                cells.append(f"{one[side][part] / base[side][part]:.2f}{mark}")
            memory, own = (costs[side]["memory"] for costs in (one, base))
            cells.append(f"{memory / own:.2f}" if own else f"{memory / 1e6:.0f} MB")
    return cells


def _verdicts(found: Found, rounds: int, tpu: str | None) -> list[str]:
    """The goals, and whether they are met."""
    lines = [f"the naive loss converges within {rounds} iterations"]
    for side, name in _sides(tpu).items():
        cost = {key: one[side] for key, one in found.items()}
        alone = {key: found[key]["alone"][side] for key in ALONE}
        whole, same = (
            [costs[key]["bytes"] / costs[BASE]["bytes"] for costs in (cost, alone)]
            for key in (NAIVE, FIXED)
        )
        verdict = ""
        if side == "tpu":
            verdict = f"; goal {GOAL}: {'met' if whole[1] >= GOAL else 'missed'}"
        lines.append(
            f"{name}: the naive loss moves {whole[0]:.1f} times the bytes, its transport "
            f"{whole[1]:.1f} times (in as many iterations {same[1]:.1f}){verdict}"
        )
        for decoder, first, last in (
            ("distribution", BASE, "stride 4"),
            ("direct", "direct, stride 1", "direct, stride 4"),
        ):
            grown = [cost[last][part] / cost[first][part] for part in ("FLOPs", "bytes")]
            lines.append(
                f"{name}: from stride 1 to 4 the {decoder} decoder's loss takes "
                f"{grown[0]:.2f} times the FLOPs and {grown[1]:.2f} times the bytes"
            )
    return lines
