"""Searches batch size, mesh, remat, attention and update for the plan of most images a second.

Where a batch does not fit, no larger one is compiled. Microbatches are not tried, since remat and
fsdp save memory at a lower cost.
"""

import itertools
import pathlib
from collections.abc import Callable, Iterable, Sequence
from math import prod

from absl import logging
from ml_collections import ConfigDict

from conprediff_jax.common import extras
from conprediff_jax.common.errors import UserError
from conprediff_jax.planning.plans import OFF, Plan, make_plan
from conprediff_jax.planning.topology import Topology


def sweep(
    config: ConfigDict,
    topology: Topology,
    *,
    per_chip: Sequence[int],
    fsdp: Sequence[int],
    tensor: Sequence[int],
    remat: Sequence[str],
    attention: Sequence[str] = (),
    divide_update: Sequence[bool] = (),
    done: Callable[[Plan], None] = lambda plan: None,
) -> list[Plan]:
    """Plans every combination that may fit.

    Args:
        config: The config of a training run, in which all of this is replaced.
        topology: The slice.
        per_chip: Numbers of examples a chip.
        fsdp: Sizes of the axis `fsdp`.
        tensor: Sizes of the axis `tensor`. Meshes that do not divide the chips are left out.
        remat: `OFF`, or keys of `REMAT_POLICIES`.
        attention: Values of `model.attention`; empty for the config's own.
        divide_update: Values of `train.divide_update`; empty for the config's own.
        done: A function that is called with every plan as soon as it is made.

    Raises:
        UserError: There is nothing to try.
    """
    meshes = [pair for pair in itertools.product(fsdp, tensor) if not topology.chips % prod(pair)]
    settings = list(
        itertools.product(
            meshes,
            remat,
            attention or [None],
            divide_update or [config.train.divide_update],
        )
    )
    if not settings or not per_chip:
        raise UserError(
            f"no fsdp of {list(fsdp)} x tensor of {list(tensor)} divides {topology.chips} chips"
        )
    plans: list[Plan] = []
    for (fsdp_size, tensor_size), policy, kernel, divided in settings:
        for examples in sorted(per_chip):
            candidate = _computed(config, policy, kernel)
            candidate.train.batch_size = examples * topology.chips
            candidate.train.microbatches = 1
            candidate.train.divide_update = divided
            candidate.mesh.update(data=-1, fsdp=fsdp_size, tensor=tensor_size)
            logging.info(
                "sweep: fsdp %d, tensor %d, remat %s, attention %s, update %s, %d examples a chip",
                fsdp_size, tensor_size, policy, kernel or "as configured",
                "divided" if divided else "whole", examples,
            )  # fmt: skip
            plan = make_plan(candidate, topology, context_share=False, sampler=False)
            plans.append(plan)
            done(plan)
            if not plan.train.fits:
                break
    return plans


def _computed(config: ConfigDict, policy: str, kernel: str | None) -> ConfigDict:
    """A copy of a config whose model keeps and attends as is said."""
    candidate = config.copy_and_resolve_references()
    candidate.model.remat = policy != OFF
    if policy != OFF:
        candidate.model.remat_policy = policy
    if kernel is not None:
        candidate.model.attention = kernel
    return candidate


def best(plans: Iterable[Plan]) -> Plan | None:
    """The fitting plan with most images a second; of equal plans, the one with least memory."""
    fitting = [plan for plan in plans if plan.train.fits]
    key = lambda plan: (plan.images_per_second, -plan.train.needed)  # noqa: E731
    return max(fitting, key=key, default=None)


def _setting(plan: Plan) -> str:
    """The setting of a plan in words, for the legend of the plot."""
    mesh = " x ".join(map(str, plan.mesh.values()))
    remat = "" if plan.remat == OFF else f", remat {plan.remat}"
    update = "" if plan.divide_update else ", whole update"
    return f"{mesh}, {plan.attention}{remat}{update}"


def plot(plans: Sequence[Plan], path: pathlib.Path) -> None:
    """Plots images a second and memory over the examples a chip, with a line for each setting."""
    pyplot = extras.pyplot()
    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    settings = itertools.groupby(plans, key=_setting)
    for label, group in settings:
        group = list(group)
        fitting = [plan for plan in group if plan.train.fits]
        examples = [plan.batch_size / plan.topology.chips for plan in fitting]
        speed.plot(examples, [p.images_per_second for p in fitting], marker="o", label=label)
        known = [plan for plan in group if plan.train.needed]
        memory.plot(
            [plan.batch_size / plan.topology.chips for plan in known],
            [plan.train.needed / 1e9 for plan in known],
            marker="o",
            label=label,
        )
    chip = plans[0].topology.chip
    memory.axhline(chip.hbm_bytes / 1e9, color="black", linestyle="--", label="a chip has")
    highest = max(plan.images_per_second for plan in plans)
    speed.set(ylabel="images/s at best", ylim=(0, 1.1 * highest or 1), title=str(plans[0].topology))
    memory.set(ylabel="GB a chip", ylim=(0, None))
    memory.legend(title="data x fsdp x tensor")
    tried = sorted({plan.batch_size // plan.topology.chips for plan in plans})
    for axes in (speed, memory):
        axes.set_xscale("log", base=2)
        axes.set_xticks(tried, tried)
        axes.set_xlabel("examples a chip")
    figure.savefig(path)
    pyplot.close(figure)
