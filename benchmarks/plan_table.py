"""The table of docs/plans.md: shipped configs on TPU slices, each compiled once and kept.

    python benchmarks/plan_table.py                      # everything; days on a laptop
    python benchmarks/plan_table.py --configs=celebahq --topologies=v5e-16
    python benchmarks/plan_table.py --configs=coco --fsdp=8
    python benchmarks/plan_table.py --compile=False      # the table of what is there

A plan is what `conprediff_jax.plan` writes, one JSON file in `--folder`. Those that are there are
not made again, so the command may be stopped at any time and started again: at most the plan in
work is lost. The batch is the config's own, or the next larger one that the chips can divide.
"""

import importlib.util
import json
import pathlib
import subprocess
import sys

from absl import flags, logging

from conprediff_jax.cli import app
from conprediff_jax.common.errors import UserError
from conprediff_jax.planning import tables
from conprediff_jax.planning.plans import Plan
from conprediff_jax.planning.topology import Topology

ROOT = pathlib.Path(__file__).parent.parent
# What compiles in a minute comes first.
CONFIGS = ["openmoji", "openmoji_latent", "openmoji_text", "openmoji_discrete", "cifar10"]
CONFIGS += ["celebahq", "imagenet", "ffhq_discrete", "lsun_churches", "imagenet_discrete"]
CONFIGS += ["coco_discrete", "coco"]
TOPOLOGIES = ["v5e-16", "v4-128", "v5p-64", "v5e-256"]

_CONFIGS = flags.DEFINE_list("configs", CONFIGS, "Names of files in configs/.")
_TOPOLOGIES = flags.DEFINE_list("topologies", TOPOLOGIES, "TPU slices.")
_FOLDER = flags.DEFINE_string("folder", "plans", "Where plans are kept.")
_COMPILE = flags.DEFINE_bool("compile", True, "Make the plans that are missing.")
_FSDP = flags.DEFINE_integer("fsdp", 1, "Devices that share the parameters.", lower_bound=1)
_WHOLE = flags.DEFINE_bool("whole", False, "With the sampler, and the step without context.")


def batch_size(config: pathlib.Path, chips: int) -> int:
    """The config's own, or the next larger one that the chips can divide."""
    spec = importlib.util.spec_from_file_location(config.stem, config)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return -(-module.get_config().train.batch_size // chips) * chips


def make(config: pathlib.Path, topology: Topology, out: pathlib.Path) -> bool:
    """Makes a plan in a process of its own; whether that worked."""
    command = [
        sys.executable,
        "-m",
        "conprediff_jax.plan",
        f"--config={config.relative_to(ROOT)}",
        f"--topology={topology}",
        f"--config.train.batch_size={batch_size(config, topology.chips)}",
        f"--config.mesh.fsdp={_FSDP.value}",
        f"--sampler={_WHOLE.value}",
        f"--context_share={_WHOLE.value}",
        f"--out={out.absolute()}",
    ]
    logging.info("%s", " ".join(command))
    code = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode
    if code < 0:
        logging.warning("killed by signal %d: compiling may take more memory than there is", -code)
    return code == 0


def main(argv: list[str]) -> None:
    """Makes what is missing, and prints the table."""
    del argv
    folder, rows = pathlib.Path(_FOLDER.value), []
    topologies = [Topology.parse(name) for name in _TOPOLOGIES.value]
    for name in _CONFIGS.value:
        config = ROOT / "configs" / f"{name}.py"
        if not config.is_file():
            raise UserError(f"--configs={name}: there is no {config.relative_to(ROOT)}")
        for topology in topologies:
            file = folder / f"{name}_{str(topology).replace(':', '_')}.json"
            if not file.exists() and not (_COMPILE.value and make(config, topology, file)):
                continue
            plan = Plan.from_dict(json.loads(file.read_text(encoding="utf-8")))
            rows.append([name, *tables.row(plan)])
    print(tables.markdown(rows, ("config", *tables.HEADER)))


if __name__ == "__main__":
    app.run(main)
