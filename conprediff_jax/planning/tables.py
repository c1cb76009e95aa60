"""Plans as text."""

from collections.abc import Sequence

from conprediff_jax.planning.account import Account, roofline
from conprediff_jax.planning.plans import OFF, Plan
from conprediff_jax.xla.chips import Chip

_GB = 1e9
_MEMORY = (
    ("parameters", "parameters"),
    ("moving average", "average"),
    ("optimiser", "optimizer"),
    ("frozen networks and other state", "own_state"),
    ("batch", "batch"),
    ("activations", "activations"),
    ("temporaries", "temporaries"),
    ("program", "code"),
)


def describe(plan: Plan) -> str:
    """Describes a plan in full."""
    topology = plan.topology
    axes = ", ".join(f"{name} {size}" for name, size in plan.mesh.items())
    lines = [
        f"{topology}: {topology.chips} chips, mesh {axes}; batch {plan.batch_size} in "
        f"{plan.microbatches} part(s), {_how(plan)}",
        "",
        *_account("train step", plan.train, topology.chip),
    ]
    if plan.train.fits:
        times = plan.roofline
        lines.append(
            f"  at best {times.step * 1e3:.2f} ms a step, {plan.images_per_second:,.0f} images/s, "
            f"bound by {times.bound_by}"
        )
    if plan.plain is not None:
        lines += ["", *_context(plan)]
    if plan.sampler is not None:
        lines += [
            "",
            *_account(f"sampler, {plan.sampled} images", plan.sampler, topology.chip),
        ]
        if plan.sampler.fits:
            step = roofline(plan.sampler, topology.chip).step
            lines.append(f"  at best {step:.2f} s, {plan.sampled / step:,.1f} images/s")
    return "\n".join(lines)


def _account(name: str, account: Account, chip: Chip) -> list[str]:
    """Lines on the memory and the work of one program."""
    room = chip.hbm_bytes
    verdict = "fits" if account.fits else "DOES NOT FIT"
    needed = f"{account.needed / _GB:.2f}" if account.needed else "more than there are"
    lines = [f"{name}: {verdict}; HBM {needed} of {room / _GB:.2f} GB a chip"]
    for label, field in _MEMORY:
        if value := getattr(account.memory, field):
            lines.append(f"  {label:32} {value / _GB:9.3f} GB")
    if not account.fits:
        return lines
    times = roofline(account, chip)
    cost = account.cost
    intensity = cost.flops / cost.bytes if cost.bytes else 0.0
    lines += [
        f"  {'FLOPs a chip':32} {cost.flops / 1e12:9.3f} T    {times.compute * 1e3:9.2f} ms",
        f"  {'HBM bytes a chip':32} {cost.bytes / _GB:9.3f} GB   {times.memory * 1e3:9.2f} ms",
    ]
    for axis, total in account.traffic.items():
        seconds = total["traffic"] / chip.ici_bandwidth
        lines.append(
            f"  {'sent along ' + axis:32} {total['traffic'] / _GB:9.3f} GB   "
            f"{seconds * 1e3:9.2f} ms   {total['operations']:.0f} collectives on "
            f"{total['payload'] / _GB:.3f} GB"
        )
    ridge = chip.flops / chip.hbm_bandwidth
    lines.append(
        f"  {'arithmetic intensity':32} {intensity:9.1f} FLOP/B (the chip balances at {ridge:.0f})"
    )
    lines.append(
        f"  (by XLA, loops once, on-core memory too: {account.xla.flops / 1e12:.3f} TFLOP, "
        f"{account.xla.bytes / _GB:.2f} GB; compiled in {account.compile_seconds:.0f} s)"
    )
    for scope, part in account.parts.items():
        if len(account.parts) > 1:
            lines.append(
                f"  {'by name: ' + (scope.replace('_', ' ') or 'the rest'):32} "
                f"{_percent(part.flops, cost.flops)} of FLOPs {_percent(part.bytes, cost.bytes)} "
                "of bytes"
            )
    if account.unknown_loops:
        lines.append(f"  {account.unknown_loops} loop(s) of unknown length are counted once")
    return lines


def _how(plan: Plan) -> str:
    """How a step of a plan is computed, in words."""
    remat = plan.remat if plan.remat == OFF else f"keeps {plan.remat}"
    attention = f"attention {plan.attention}, " if plan.attention else ""
    return f"remat {remat}, {attention}update {_update(plan)}"


def _update(plan: Plan) -> str:
    return "divided" if plan.divide_update else "whole"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole if whole else 0:8.2f} %"


def _context(plan: Plan) -> list[str]:
    """Lines on what context prediction adds."""
    share = plan.context_share
    if share is None:
        return ["context prediction: the step without it does not fit, so there is no share"]
    lines = ["context prediction, as a share of the train step"]
    for name, value in share.items():
        if name != "collectives":
            lines.append(f"  {name:32} {100 * value:8.2f} %")
    lines.append(f"  {'collectives of its own':32} {share['collectives']:+8.0f}")
    return lines


HEADER = (
    "topology",
    "mesh (data, fsdp, tensor)",
    "batch",
    "remat",
    "attention",
    "update",
    "fits",
    "HBM GB",
    "TFLOP",
    "HBM GB moved",
    "sent GB",
    "ms at best",
    "bound by",
    "images/s",
    "context FLOPs",
    "context bytes",
)


def row(plan: Plan) -> list[str]:
    """A plan as one row of the table with `HEADER`."""
    train, share = plan.train, plan.context_share
    needed = f"{train.needed / _GB:.1f}" if train.needed else "-"
    first = [
        str(plan.topology),
        " x ".join(str(size) for size in plan.mesh.values()),
        f"{plan.batch_size}" + (f" / {plan.microbatches}" if plan.microbatches > 1 else ""),
        plan.remat,
        plan.attention or "-",
        _update(plan),
        "yes" if train.fits else "no",
        needed,
    ]
    if not train.fits:
        return first + ["-"] * (len(HEADER) - len(first))
    times = plan.roofline
    return [
        *first,
        f"{train.cost.flops / 1e12:.2f}",
        f"{train.cost.bytes / _GB:.1f}",
        f"{train.sent / _GB:.2f}",
        f"{times.step * 1e3:.1f}",
        times.bound_by,
        f"{plan.images_per_second:,.0f}",
        f"{100 * share['FLOPs']:.1f} %" if share else "-",
        f"{100 * share['HBM bytes']:.1f} %" if share else "-",
    ]


def markdown(rows: Sequence[Sequence[str]], header: Sequence[str] = HEADER) -> str:
    """A Markdown table whose columns are aligned in plain text too."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )
