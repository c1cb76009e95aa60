"""Makes the table of docs/plans.md, of shipped configs on TPU slices.

    python benchmarks/plan_table.py                      # everything; days on a laptop
    python benchmarks/plan_table.py --configs=celebahq --topologies=v5e-16
    python benchmarks/plan_table.py --configs=coco --fsdp=8
    python benchmarks/plan_table.py --compile=False      # only the table of plans that exist

Each plan is a JSON file of `conprediff_jax.plan` in `--folder`. Plans that exist are not made
again, so you can stop the command at any time and start it again; only the plan in progress is
lost. The batch size is that of the config, or the next larger one that the chips can divide.
"""

import json
import pathlib
import subprocess
import sys

from absl import flags, logging
from study import shipped

from conprediff_jax.cli import app
from conprediff_jax.planning import tables
from conprediff_jax.planning.plans import Plan
from conprediff_jax.planning.topology import Topology

# Configs that compile in a minute come first.
CONFIGS = ["openmoji", "openmoji_latent", "openmoji_text", "openmoji_discrete", "cifar10"]
CONFIGS += ["celebahq", "imagenet", "ffhq_discrete", "lsun_churches", "imagenet_discrete"]
CONFIGS += ["coco_discrete", "coco"]
TOPOLOGIES = ["v5e-16", "v4-128", "v5p-64", "v5e-256"]

_CONFIGS = flags.DEFINE_list("configs", CONFIGS, "Names of files in configs/.")
_TOPOLOGIES = flags.DEFINE_list("topologies", TOPOLOGIES, "TPU slices.")
_FOLDER = flags.DEFINE_string("folder", "plans", "Folder of the plans.")
_COMPILE = flags.DEFINE_bool("compile", True, "Make the plans that are missing.")
_FSDP = flags.DEFINE_integer("fsdp", 1, "Devices that divide the parameters.", lower_bound=1)
_WHOLE = flags.DEFINE_bool("whole", False, "Plan the sampler and the step without context too.")


def make(name: str, topology: Topology, out: pathlib.Path) -> bool:
    """Makes a plan in a process of its own, and returns whether that worked."""
    command = [
        sys.executable,
        "-m",
        "conprediff_jax.plan",
        f"--config={shipped.path_of(name).relative_to(shipped.ROOT)}",
        f"--topology={topology}",
        f"--config.train.batch_size={shipped.config(name, topology.chips).train.batch_size}",
        f"--config.mesh.fsdp={_FSDP.value}",
        f"--sampler={_WHOLE.value}",
        f"--context_share={_WHOLE.value}",
        f"--out={out.absolute()}",
    ]
    logging.info("%s", " ".join(command))
    code = subprocess.run(command, cwd=shipped.ROOT, stdout=subprocess.DEVNULL).returncode
    if code < 0:
        logging.warning("killed by signal %d: compiling may take more memory than there is", -code)
    return code == 0


def main(argv: list[str]) -> None:
    """Makes the missing plans, and prints the table."""
    del argv
    folder, rows = pathlib.Path(_FOLDER.value), []
    topologies = [Topology.parse(name) for name in _TOPOLOGIES.value]
    for name in _CONFIGS.value:
        shipped.path_of(name)
        for topology in topologies:
            file = folder / f"{name}_{str(topology).replace(':', '_')}.json"
            if not file.exists() and not (_COMPILE.value and make(name, topology, file)):
                continue
            plan = Plan.from_dict(json.loads(file.read_text(encoding="utf-8")))
            rows.append([name, *tables.row(plan)])
    print(tables.markdown(rows, ("config", *tables.HEADER)))


if __name__ == "__main__":
    app.run(main)
