"""How much faster the data pipeline is than the train step that it feeds, on the same cores.

    python benchmarks/data.py --config=configs/openmoji.py

Steps and batches are timed in turn, round after round, and the medians are compared, so that a busy
machine slows both alike. Every round opens the pipeline anew, so that no batch is prepared while a
step runs. With a ratio above 1, a step never waits for data; 5 leaves room for a faster device.
"""

import statistics
import time
from collections.abc import Iterator

import numpy as np
from absl import flags
from study.steps import TimedStep

from conprediff_jax import data
from conprediff_jax.cli import app, config_flag
from conprediff_jax.config.vocabulary import with_vocabulary

_CONFIG = config_flag.define("configs/openmoji.py")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds that are timed.", lower_bound=1)
_BATCHES = flags.DEFINE_integer("batches", 20, "Batches read in a round.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 3, "Train steps in a round.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Prints both speeds and their ratio."""
    del argv
    step = TimedStep(with_vocabulary(_CONFIG.value))
    experiment = step.experiment
    batch_size = experiment.train.batch_size

    def open_batches() -> Iterator[dict[str, np.ndarray]]:
        return data.make_iterator(
            experiment.data,
            batch_size=batch_size,
            seed=experiment.seed,
            tokenizer=experiment.task.tokenizer,
        )

    reading = []
    for _ in range(_ROUNDS.value):
        batches = open_batches()
        next(batches)  # starts the threads
        began = time.perf_counter()
        for _ in range(_BATCHES.value):
            next(batches)
        reading.append((time.perf_counter() - began) / _BATCHES.value)
        del batches
        for _ in range(_STEPS.value):
            step.run()
    read, stepped = statistics.median(reading), statistics.median(step.seconds[1:])
    for name, seconds in {"pipeline": read, "step": stepped}.items():
        print(f"{name:8} {batch_size / seconds:8.0f} images/s   {seconds * 1e3:8.2f} ms a batch")
    print(f"ratio    {stepped / read:8.1f}")


if __name__ == "__main__":
    app.run(main)
