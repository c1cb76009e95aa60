"""How much the context loss adds to the time and the FLOPs of a train step.

    python benchmarks/step_overhead.py --config=configs/openmoji.py

In the last row, the UNet of the config's step has Flax's own layers in place of those of
`conprediff_jax.common.linear`, which sum gradients in float32. Compare it with `the config's`.

Variants are timed in turn, round after round, and the medians are compared, so that a busy machine
slows all of them alike. Absolute times hold for this machine at this moment only. FLOPs are read
from the compiled programs, with every round of a loop counted; loops of unknown length, which exact
matching has, count once.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from absl import flags
from study.steps import TimedStep, time_in_turn

from conprediff_jax.cli import app, config_flag
from conprediff_jax.common import linear
from conprediff_jax.common.errors import UserError

_CONFIG = config_flag.define("configs/openmoji.py")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Timed steps of every variant.")

VARIANTS = {
    "no context": {"context.weight": 0.0},
    "the config's": {},
    "every point": {"context.points_per_example": 0},
    "exact": {"context.transport": "exact"},
    "sinkhorn_divergence": {"context.transport": "sinkhorn_divergence"},
    "gaussian": {"context.transport": "gaussian"},
    "direct decoder": {"context.decoder": "direct"},
}
FLAX = "Flax's layers"


def variant(overrides: Mapping[str, Any]) -> TimedStep:
    """The config's step with some keys changed."""
    config = _CONFIG.value.copy_and_resolve_references()
    if config.task != "denoising":
        raise UserError("--config: the config trains a first stage, which predicts no context")
    config.update_from_flattened_dict(overrides)
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
    variants = {name: variant(overrides) for name, overrides in VARIANTS.items()}
    if "channel_mult" in _CONFIG.value.model:  # transformers bind their layers on import
        with flax_layers():
            variants[FLAX] = variant({})
    medians = time_in_turn(variants, _ROUNDS.value, warm_up=2)
    plain, base = variants["no context"], medians["no context"]
    print(f"{'variant':22} {'ms a step':>10} {'time':>7} {'FLOPs':>7}   (relative to no context)")
    for name, step in variants.items():
        time, flops = medians[name], step.flops / plain.flops
        print(f"{name:22} {time * 1e3:10.1f} {time / base:7.3f} {flops:7.3f}")


if __name__ == "__main__":
    app.run(main)
