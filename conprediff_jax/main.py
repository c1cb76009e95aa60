"""Trains a model.

    python -m conprediff_jax.main --config=configs/openmoji.py
    python -m conprediff_jax.main --config=configs/openmoji.py --workdir=runs/mine
        --config.data.name=./photos --config.train.steps=2000
    python -m conprediff_jax.main --config=configs/openmoji.py --workdir=runs/no_context
        --config.context.weight=0

You can set any key of the config on the command line. A run that is started again with the same
workdir continues from its newest checkpoint. It names the keys of the config that have changed, and
refuses other data unless --allow_changes is given. On Ctrl-C, a run saves its step and ends. On
SIGTERM, it does the same and exits with code 75, which tells a launcher to start it again.

Several processes train together if you start each of them with JAX_COORDINATOR_ADDRESS (host:port
of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or with --distributed on Cloud TPU,
Slurm or Open MPI. The scripts in launch/ do this. All processes must see the same workdir.
"""

import pathlib
import shlex
import sys

from absl import flags

from conprediff_jax.cli import config_flag, headers, help

_CONFIG = config_flag.define()
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Write checkpoints, events and samples to this folder; the default is runs/<config name>.",
)
_ALLOW = flags.DEFINE_bool(
    "allow_changes",
    False,
    "Continue the run in the workdir even with other data, classes or seed, or with another first "
    "stage.",
)
_LOG = flags.DEFINE_list(
    "log",
    [],
    "Log to these services, too: wandb (Weights & Biases). TensorBoard events and metrics.jsonl "
    "are always written.",
)
flags.DEFINE_bool("list", False, "List the shipped configs, one line each, and exit.")
_PRINT = flags.DEFINE_bool(
    "print_config", False, "Print every key of the config with its value and meaning, and exit."
)
flags.mark_flag_as_required("config")

help.answer(__name__, several=True, list=headers.listing)  # before imports that take seconds

from conprediff_jax.cli import app
from conprediff_jax.common.files import check_folder
from conprediff_jax.config import reference
from conprediff_jax.train import logs, needs
from conprediff_jax.train.loop import train


def main(argv: list[str]) -> None:
    """Reads the flags, and trains or prints the config."""
    del argv
    if _PRINT.value:
        print(reference.printed(_CONFIG.value))
        return
    workdir = _WORKDIR.value or str(pathlib.Path("runs") / app.config_name().stem)
    check_folder(workdir, "--workdir")
    logs.check(_LOG.value)
    needs.check(_CONFIG.value, workdir, headers.read(app.config_name()).needs)
    command = shlex.join(sys.orig_argv)
    train(_CONFIG.value, workdir, allow_changes=_ALLOW.value, command=command, log=_LOG.value)


if __name__ == "__main__":
    app.run(main, several=True, again="the same command continues from the last saved step")
