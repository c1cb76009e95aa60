"""Runs commands one after the other in the processes of one start, which saves their imports.

python several_commands.py FILE    with a list of commands and their flags as JSON
"""

import functools
import importlib
import json
import pathlib
import sys

import jax
import numpy as np
from absl import flags

import conprediff_jax.cli
from conprediff_jax.cli import app
from conprediff_jax.metrics import features
from conprediff_jax.parallel import share

SHARED = ("sampling_flags", "guide_flag", "inpainting_flags", "lpips_flags", "sweep_flag")


def pixels():
    names = ("frechet", "kernel", "precision", "recall")
    return features.Extractor(
        name="pixels",
        fingerprint="pixels",
        apply=lambda params, images: {"pool": images.reshape(len(images), -1)[:, ::3] / params},
        params=np.float32(255),
        labels={name: name for name in names},
    )


def main(argv):
    extractor = pixels()
    features.random_extractor = lambda: extractor
    kept = set(flags.FLAGS)
    for name, *arguments in json.loads(pathlib.Path(argv[1]).read_text()):
        forget_flags(kept)
        command = importlib.import_module(f"conprediff_jax.{name}")
        command.main(app._parse_flags([name, *arguments]))
        share.wait_for_all()


def forget_flags(kept):
    """Commands define flags of the same names, which no process has otherwise."""
    for flag in set(flags.FLAGS) - kept:
        delattr(flags.FLAGS, flag)
    for module in SHARED:
        if sys.modules.pop(f"conprediff_jax.cli.{module}", None):
            delattr(conprediff_jax.cli, module)


if __name__ == "__main__":
    # The machine may be paused for minutes, which processes must not take for the end of others.
    patient = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=900)
    jax.distributed.initialize = patient
    app.run(main, several=True, positional=1)
