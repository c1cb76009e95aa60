"""How much a chip sends and computes as chips are added, by programs for 2, 4 and 8 devices.

    python benchmarks/collectives.py --config=configs/openmoji.py

The batch grows with the number of devices, but the payload of the collectives on every chip must
not. Under `data`, the gradients are as large as the parameters for any number of devices, and a
ring sends 2 (n - 1) / n times as much. Under `fsdp`, the parameters are gathered too, for the
forward and the backward pass. The programs are compiled for simulated devices and not run, so the
figures do not depend on the load of the machine.
"""

import os

# JAX reads these when it starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax

from conprediff_jax import parallel
from conprediff_jax.cli import app, config_flag
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.planning import tables
from conprediff_jax.planning.programs import lower_train_step
from conprediff_jax.xla.collectives import Collective, collectives
from conprediff_jax.xla.cost import program_cost
from conprediff_jax.xla.hlo import Module

_CONFIG = config_flag.define("configs/openmoji.py")

DEVICES = (2, 4, 8)
EXAMPLES = 8  # a device
HEADER = (
    "devices", "axis", "context", "collectives", "MB a chip", "ratio", "MB sent by a ring", "GFLOP"
)  # fmt: skip


def compiled(devices: int, weight: float, axis: str) -> tuple[list[Collective], float]:
    """The collectives of a step on devices along one axis, and the FLOPs of every device."""
    config = _CONFIG.value.copy_and_resolve_references()
    config.train.batch_size = EXAMPLES * devices
    config.context.weight = weight
    config.mesh.update({"data": 1, axis: devices})
    experiment = make_experiment(config)
    mesh = parallel.make_mesh(experiment.mesh, jax.devices()[:devices])
    module = Module(lower_train_step(experiment, mesh).compile().as_text())
    return collectives(module, dict(mesh.shape)), program_cost(module).flops


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    whole = _CONFIG.value.context.weight
    settings = [(n, "data", weight) for n in DEVICES for weight in (whole, 0.0)]
    settings += [(n, "fsdp", whole) for n in DEVICES]
    rows, base = [], None
    for devices, axis, weight in settings:
        found, flops = compiled(devices, weight, axis)
        payload, sent = sum(c.payload for c in found), sum(c.traffic for c in found)
        base = base or payload
        rows.append(
            [
                str(devices),
                axis,
                "with" if weight else "without",
                str(sum(c.times for c in found)),
                f"{payload / 1e6:.3f}",
                f"{payload / base:.3f}",
                f"{sent / 1e6:.3f}",
                f"{flops / 1e9:.3f}",
            ]
        )
    print(tables.markdown(rows, HEADER))


if __name__ == "__main__":
    app.run(main)
