"""Estimates memory, FLOPs and step time on a TPU slice that you do not have.

    python -m conprediff_jax.plan --config=configs/celebahq.py --topology=v5e:4x4
    python -m conprediff_jax.plan --config=configs/celebahq.py --topology=v5e:4x4
        --config.mesh.fsdp=4 --out=plan.json --nosampler --nocontext_share
    python -m conprediff_jax.plan --config=configs/celebahq.py --topology=v5e-16 --sweep

A topology is a grid of chips, such as v5e:4x4 or v4:4x4x4, or a name of Cloud TPU, such as v5e-16,
v4-128 (64 chips) or v5p-64 (32 chips). libtpu compiles the real train step and sampler ahead of
time, on any machine; `pip install -e ".[plan]"` installs it. A program of a large model takes
minutes to compile, and compiled programs are not kept.

All figures are per chip. FLOPs and HBM bytes are read from the compiled program, in which loops
count as often as they run. Times are those of a roofline model, which no real step reaches.
`--sweep` tries batch sizes, meshes and rematerialisation, and kernels of attention and ways to
update if they are named. It writes a table, a JSON file and a plot.
"""

import json
import pathlib
from collections.abc import Sequence

from absl import flags

from conprediff_jax.cli import config_flag, help
from conprediff_jax.cli.choices import TOPOLOGIES

_CONFIG = config_flag.define()
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, f"Compile for this TPU slice: {TOPOLOGIES}.", required=True
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "Write the plan to this JSON file; the default is plans/<config>_<topology>.json.",
)
_SAMPLER = flags.DEFINE_bool("sampler", True, "Compile the sampler, too.")
_SHARE = flags.DEFINE_bool(
    "context_share",
    True,
    "Compile the train step without context prediction, too, to see the share that the context "
    "takes.",
)
_SWEEP = flags.DEFINE_bool("sweep", False, "Search for the best plan that fits into memory.")
_PER_CHIP = flags.DEFINE_list(
    "sweep_per_chip", ["1", "2", "4", "8"], "Sweep these numbers of examples per chip."
)
_REMAT = flags.DEFINE_list(
    "sweep_remat",
    ["off", "nothing"],
    "Sweep rematerialisation: off keeps all activations; otherwise blocks are computed again in "
    "the backward pass, and keep nothing, or the products of their layers.",
)
_ATTENTION = flags.DEFINE_list(
    "sweep_attention", [], "Sweep these kernels of attention; by default only the config's."
)
_UPDATE = flags.DEFINE_list(
    "sweep_divide_update",
    [],
    "Sweep whether the data axis divides the update of the weights: 1 or 0; by default only as in "
    "the config.",
)
_FSDP = flags.DEFINE_list("sweep_fsdp", ["1", "4"], "Sweep these sizes of the mesh's fsdp axis.")
_TENSOR = flags.DEFINE_list("sweep_tensor", ["1"], "Sweep these sizes of the mesh's tensor axis.")
flags.mark_flag_as_required("config")

help.answer(__name__)  # before imports that take seconds

import jax
from absl import logging

from conprediff_jax.cli import app
from conprediff_jax.common import extras, opening
from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import check_file, write_text
from conprediff_jax.models.attention import KINDS
from conprediff_jax.models.blocks import REMAT_POLICIES
from conprediff_jax.planning import sweep as sweep_lib
from conprediff_jax.planning import tables
from conprediff_jax.planning.plans import OFF, Plan, make_plan
from conprediff_jax.planning.topology import Topology


def main(argv: list[str]) -> None:
    """Reads the flags, compiles, and reports."""
    del argv
    file = app.config_name()
    jax.config.update("jax_platforms", "cpu")  # leaves accelerators of this machine alone
    jax.config.update("jax_enable_compilation_cache", False)  # which cannot read TPU programs
    topology = Topology.parse(_TOPOLOGY.value)
    name = f"{file.stem}_{topology.generation}_{'x'.join(map(str, topology.shape))}"
    out = pathlib.Path(_OUT.value or pathlib.Path("plans") / f"{name}.json")
    check_file(out, "--out")
    cpu = "the CPU, which compiles a program in minutes"
    opening.say(str(file), f"a plan for {topology}", out, on=cpu)
    if _SWEEP.value:
        _sweep(topology, out)
        return
    plan = make_plan(_CONFIG.value, topology, context_share=_SHARE.value, sampler=_sampled())
    print(tables.describe(plan))
    write_text(out, json.dumps(plan.as_dict(), indent=1) + "\n")
    logging.info("plan written to %s", out)


def _sampled() -> bool:
    """Whether to compile the sampler; a first stage has none."""
    return _SAMPLER.value and _CONFIG.value.task == "denoising"


def _sweep(topology: Topology, out: pathlib.Path) -> None:
    """Searches for the best plan; a sweep may take hours, so every plan is written at once."""
    extras.need("matplotlib", "plan")
    plans: list[Plan] = []

    def done(plan: Plan) -> None:
        plans.append(plan)
        write_text(out, json.dumps([p.as_dict() for p in plans], indent=1) + "\n")
        logging.info("%s", tables.markdown([tables.row(plan)]))

    sweep_lib.sweep(
        _CONFIG.value,
        topology,
        per_chip=_integers("sweep_per_chip", _PER_CHIP.value, 1),
        fsdp=_integers("sweep_fsdp", _FSDP.value, 1),
        tensor=_integers("sweep_tensor", _TENSOR.value, 1),
        remat=_choices("sweep_remat", _REMAT.value, (OFF, *REMAT_POLICIES)),
        attention=_choices("sweep_attention", _ATTENTION.value, KINDS),
        divide_update=[bool(value) for value in _integers("sweep_divide_update", _UPDATE.value, 0)],
        done=done,
    )
    print(tables.markdown([tables.row(plan) for plan in plans]))
    chosen = sweep_lib.best(plans)
    print("\nbest: " + (tables.describe(chosen) if chosen else "no plan fits into memory"))
    picture = out.with_suffix(".png")
    sweep_lib.plot(plans, picture)
    logging.info("%d plans written to %s, plot: %s", len(plans), out, picture)


def _integers(flag: str, values: list[str], least: int) -> list[int]:
    """The values of a list flag as integers of at least `least`."""
    if not all(value.isdigit() and int(value) >= least for value in values):
        raise UserError(f"--{flag}={','.join(values)}: give whole numbers of at least {least}")
    return [int(value) for value in values]


def _choices(flag: str, values: list[str], known: Sequence[str]) -> list[str]:
    """The values of a list flag, each of which must be known."""
    if unknown := [value for value in values if value not in known]:
        raise UserError(f"--{flag}={','.join(values)}: {unknown[0]!r} is none of {list(known)}")
    return values


if __name__ == "__main__":
    app.run(main)
