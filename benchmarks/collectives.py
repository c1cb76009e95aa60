"""What a chip sends as data-parallel chips are added: on 2, 4 and 8 simulated devices, compiled.

    python benchmarks/collectives.py --config=configs/openmoji.py

The batch grows with the devices. What every chip gives to its collectives must not: gradients are
as large as the parameters, however many devices they are summed over. A ring sends that twice, less
one part in n. Nothing is run, so nothing here depends on how busy the machine is.
"""

import os

# Before JAX starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
from ml_collections import config_flags

from conprediff_jax import cli, parallel
from conprediff_jax.experiment import make_experiment
from conprediff_jax.planning import tables
from conprediff_jax.planning.collectives import Collective, collectives
from conprediff_jax.planning.hlo import Module
from conprediff_jax.planning.programs import lower_train_step

_CONFIG = config_flags.DEFINE_config_file("config", "configs/openmoji.py", "Config file.")

DEVICES = (2, 4, 8)
EXAMPLES = 8  # a device


def found(devices: int, weight: float) -> list[Collective]:
    """The collectives of a step on so many devices."""
    config = _CONFIG.value.copy_and_resolve_references()
    config.train.batch_size = EXAMPLES * devices
    config.context.weight = weight
    experiment = make_experiment(config)
    mesh = parallel.make_mesh(experiment.mesh, jax.devices()[:devices])
    compiled = lower_train_step(experiment, mesh).compile()
    return collectives(Module(compiled.as_text()), dict(mesh.shape))


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    rows, base = [], None
    for devices in DEVICES:
        for name, weight in (("with", _CONFIG.value.context.weight), ("without", 0.0)):
            here = found(devices, weight)
            payload, sent = sum(c.payload for c in here), sum(c.traffic for c in here)
            base = base or payload
            rows.append(
                [
                    str(devices),
                    name,
                    str(sum(c.times for c in here)),
                    f"{payload / 1e6:.3f}",
                    f"{payload / base:.3f}",
                    f"{sent / 1e6:.3f}",
                ]
            )
    header = ("devices", "context", "collectives", "MB a chip", "ratio", "MB sent by a ring")
    print(tables.markdown(rows, header))


if __name__ == "__main__":
    cli.run(main)
