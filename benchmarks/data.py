"""How much faster the data pipeline is than the train step that it feeds, on the same cores.

    python benchmarks/data.py --config=configs/openmoji.py

Steps and batches are timed in turn, over and over, in one run, and the medians are compared: a busy
machine slows both alike. The pipeline is read from its beginning through every stage, with nothing
prepared while the step runs. Above 1 a step never waits; 5 leaves room for a faster device.
"""

import statistics
import time

import jax
from absl import flags
from ml_collections import config_flags

from conprediff_jax import cli, data, parallel
from conprediff_jax.experiment import make_experiment
from conprediff_jax.train.state import abstract_state, init_state
from conprediff_jax.train.step import make_train_step

_CONFIG = config_flags.DEFINE_config_file("config", "configs/openmoji.py", "Config file.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds.")
_BATCHES = flags.DEFINE_integer("batches", 20, "Batches read a round.")
_STEPS = flags.DEFINE_integer("steps", 3, "Steps taken a round.")


def main(argv: list[str]) -> None:
    """Prints both speeds and their ratio."""
    del argv
    experiment = make_experiment(_CONFIG.value)
    task, batch_size = experiment.task, experiment.train.batch_size
    mesh = parallel.make_mesh(experiment.mesh)
    optimizer = experiment.optimizer.make(experiment.train.steps)
    abstract = abstract_state(task, optimizer, mesh)
    state = init_state(task, optimizer, abstract)
    train_step = make_train_step(experiment, optimizer, abstract, mesh)

    def open_batches():
        return data.make_iterator(
            experiment.data,
            batch_size=batch_size,
            seed=experiment.seed,
            tokenizer=task.tokenizer,
        )

    first = next(open_batches())
    batch = parallel.to_global({key: first[key] for key in task.batch_keys}, mesh)
    state, metrics = train_step(state, batch)  # compiles
    jax.block_until_ready(metrics)
    reading, stepping = [], []
    for _ in range(_ROUNDS.value):
        batches = open_batches()
        next(batches)  # starts the threads
        began = time.perf_counter()
        for _ in range(_BATCHES.value):
            next(batches)
        reading.append(_BATCHES.value / (time.perf_counter() - began))
        del batches
        began = time.perf_counter()
        for _ in range(_STEPS.value):
            state, metrics = train_step(state, batch)
        jax.block_until_ready((state, metrics))
        stepping.append(_STEPS.value / (time.perf_counter() - began))
    read, stepped = statistics.median(reading), statistics.median(stepping)
    print(f"pipeline {read * batch_size:8.0f} images/s   {1e3 / read:8.2f} ms a batch")
    print(f"step     {stepped * batch_size:8.0f} images/s   {1e3 / stepped:8.2f} ms a batch")
    print(f"ratio    {read / stepped:8.1f}")


if __name__ == "__main__":
    cli.run(main)
