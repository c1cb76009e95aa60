"""Trains a model.

    python -m conprediff_jax.main --config=configs/openmoji.py [--workdir=runs/mine]
        [--config.train.steps=2000] [--config.context.weight=0.1] ...

Any key of the config can be set on the command line. Started again with the same workdir, a run
goes on from its newest checkpoint; on SIGTERM it saves one and exits with 75, "start me again".

Several processes train together when each is started with JAX_COORDINATOR_ADDRESS (host:port of the
first), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or with --distributed on Cloud TPU, Slurm or Open MPI;
launch/ does so. They need a workdir that all of them see.
"""

import pathlib

from absl import flags

from conprediff_jax.cli import app, config_flag
from conprediff_jax.common.files import check_folder
from conprediff_jax.train.loop import train

_CONFIG = config_flag.define()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Checkpoints, events and samples go here; runs/<config name> when absent."
)
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    """Reads the flags and trains."""
    del argv
    workdir = _WORKDIR.value or str(pathlib.Path("runs") / app.config_name().stem)
    check_folder(workdir, "--workdir")
    train(_CONFIG.value, workdir)


if __name__ == "__main__":
    app.run(main, several=True)
