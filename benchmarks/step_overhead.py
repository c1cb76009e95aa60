"""How much a term of the loss adds to the time and the FLOPs of a train step.

    python benchmarks/step_overhead.py --config=configs/openmoji.py
    python benchmarks/step_overhead.py --config=configs/potts.py --settings=block_2,own_point

The settings are those of `ablation.py`. In the last row, a UNet has Flax's own layers in place of
those of `conprediff_jax.common.linear`, which sum gradients in float32. Compare it with `default`.

Settings are timed in turn, round after round, and the medians are compared, so that a busy machine
slows all of them alike. Absolute times hold for this machine at this moment only. FLOPs are read
from the compiled programs, with every round of a loop counted; loops of unknown length, which exact
matching has, count once.
"""

import contextlib
from collections.abc import Iterator

import flax.linen as nn
import jax
from absl import flags
from study import settings
from study.grid import BASELINE
from study.steps import TimedStep, time_in_turn

from conprediff_jax.cli import app, config_flag
from conprediff_jax.common import linear
from conprediff_jax.common.errors import UserError
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.config.vocabulary import with_any_vocabulary

_CONFIG = config_flag.define("configs/openmoji.py")
_SETTINGS = flags.DEFINE_list(
    "settings",
    ["default", "every_point", "exact", "divergence", "gaussian", "direct"],
    settings.HELP,
)
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Timed steps of every variant.")

FLAX = "Flax's layers"


def timed(name: str) -> TimedStep:
    """The config's step in a setting."""
    config = _CONFIG.value.copy_and_resolve_references()
    if config.task != "denoising":
        raise UserError("--config: the config trains a first stage, which predicts no context")
    taps = make_experiment(with_any_vocabulary(config)).task.model.denoiser.tap_names
    settings.named(name, taps).apply(config)
    return TimedStep(config)


@contextlib.contextmanager
def flax_layers() -> Iterator[None]:
    """A context in which networks are traced with Flax's own layers."""
    own = {name: getattr(linear, name) for name in ("Dense", "Conv", "Embed")}
    jax.clear_caches()  # forgets traces with the package's layers
    try:
        for name in own:
            setattr(linear, name, getattr(nn, name))
        yield
    finally:
        for name, layer in own.items():
            setattr(linear, name, layer)
        jax.clear_caches()


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    variants = {name: timed(name) for name in dict.fromkeys([BASELINE, *_SETTINGS.value])}
    if "channel_mult" in _CONFIG.value.model:  # transformers bind their layers on import
        with flax_layers():
            variants[FLAX] = timed("default")
    medians = time_in_turn(variants, _ROUNDS.value, warm_up=2)
    plain, base = variants[BASELINE], medians[BASELINE]
    print(f"{'setting':32} {'ms a step':>10} {'time':>7} {'FLOPs':>7}   (relative to the baseline)")
    for name, step in variants.items():
        time, flops = medians[name], step.flops / plain.flops
        print(f"{name:32} {time * 1e3:10.1f} {time / base:7.3f} {flops:7.3f}")


if __name__ == "__main__":
    app.run(main)
