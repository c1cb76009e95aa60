"""What the context loss costs a train step: time and FLOPs with it, relative to without.

    python benchmarks/step_overhead.py --config=configs/openmoji.py

The last row is the config's step with Flax's own layers in the UNet in place of those of
`conprediff_jax.linear`, which sum gradients in float32: to be compared with `the config's`.

Variants are timed in turn, over and over, in one run, and the medians are compared: a busy machine
slows all of them alike. Absolute times are of this machine at this moment.
"""

import contextlib
import statistics
import time
from collections.abc import Iterator

import flax.linen as nn
import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from conprediff_jax import cli, linear, parallel
from conprediff_jax.experiment import make_experiment
from conprediff_jax.train.state import abstract_state, init_state
from conprediff_jax.train.step import make_train_step

_CONFIG = config_flags.DEFINE_config_file("config", "configs/openmoji.py", "Config file.")
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


class Variant:
    """A compiled step and the state it advances."""

    def __init__(self, overrides: dict):
        config = _CONFIG.value.copy_and_resolve_references()
        config.update_from_flattened_dict(overrides)
        experiment = make_experiment(config)
        mesh = parallel.make_mesh(experiment.mesh)
        optimizer = experiment.optimizer.make(experiment.train.steps)
        abstract = abstract_state(experiment.task, optimizer, mesh)
        self.state = init_state(experiment.task, optimizer, abstract)
        size = experiment.data.image_size
        shape = (experiment.train.batch_size, size, size, 3)
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        self.batch = parallel.to_global({"image": images}, mesh)
        step = make_train_step(experiment, optimizer, abstract, mesh)
        self.step = step.lower(self.state, self.batch).compile()
        self.flops = self.step.cost_analysis()["flops"]
        self.seconds: list[float] = []

    def run(self) -> None:
        """Takes one step and notes its time."""
        began = time.perf_counter()
        self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        self.seconds.append(time.perf_counter() - began)


@contextlib.contextmanager
def flax_layers() -> Iterator[None]:
    """Networks traced inside are made of Flax's layers."""
    own = {name: getattr(linear, name) for name in ("Dense", "Conv", "Embed")}
    jax.clear_caches()  # traces of the other layers
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
    variants = {name: Variant(overrides) for name, overrides in VARIANTS.items()}
    if "channel_mult" in _CONFIG.value.model:  # transformers bind their layers on import
        with flax_layers():
            variants[FLAX] = Variant({})
    for _ in range(_ROUNDS.value + 2):
        for variant in variants.values():
            variant.run()
    plain = variants["no context"]
    base = statistics.median(plain.seconds[2:])
    print(f"{'variant':22} {'ms a step':>10} {'time':>7} {'FLOPs':>7}   (relative to no context)")
    for name, variant in variants.items():
        median = statistics.median(variant.seconds[2:])
        print(
            f"{name:22} {median * 1e3:10.1f} {median / base:7.3f} "
            f"{variant.flops / plain.flops:7.3f}"
        )


if __name__ == "__main__":
    cli.run(main)
