"""What a loop of equal blocks saves: time and memory of the compiler, and bytes that steps move.

    python benchmarks/compile_time.py --configs=ffhq_discrete,coco_discrete,imagenet_sit_xl2
    python benchmarks/compile_time.py --configs=openmoji_discrete --topology=""

Every train step is compiled twice, with a loop of the blocks and with the blocks one after another
(`model.unroll`), each in a process of its own. The first command compiles for a TPU slice, and
needs libtpu (`pip install -e ".[plan]"`). Without a topology, the program is compiled for this
machine, and steps are timed in turn.

Times are seconds of processors, so they hardly depend on what else the machine does.
"""

import concurrent.futures
import multiprocessing
import resource
import time

import jax
from absl import flags, logging
from ml_collections import ConfigDict
from study import shipped
from study.steps import TimedStep, time_in_turn

from conprediff_jax import parallel
from conprediff_jax.cli import app
from conprediff_jax.common.errors import UserError
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.config.vocabulary import with_any_vocabulary
from conprediff_jax.planning import memory as memory_lib
from conprediff_jax.planning import programs
from conprediff_jax.planning.account import compile_account
from conprediff_jax.planning.tables import markdown
from conprediff_jax.planning.topology import Topology

HEADER = (
    "config",
    "blocks",
    "lowering CPU s",
    "compiling CPU s",
    "compiler GB",
    "needs GB",
    "moves GB",
)

_CONFIGS = flags.DEFINE_list("configs", None, "Names of files in configs/.", required=True)
_TOPOLOGY = flags.DEFINE_string("topology", "v5e-16", "A TPU slice; '' for this machine.")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Timed steps on this machine.", lower_bound=1)


def config_of(name: str, topology: str, unroll: bool) -> ConfigDict:
    """A shipped config, whose batch every chip of the slice divides."""
    config = shipped.config(name, Topology.parse(topology).chips if topology else 1).unlock()
    if "unroll" not in config.model:
        raise UserError(f"--configs={name}: the model has no stack of blocks")
    config.model.unroll = unroll
    return config.lock()


def measured(name: str, topology: str, unroll: bool) -> list[str]:
    """One row of the table."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    experiment = make_experiment(with_any_vocabulary(config_of(name, topology, unroll)))
    devices = Topology.parse(topology).devices() if topology else None
    mesh = parallel.make_mesh(experiment.mesh, devices)
    given = memory_lib.arguments(
        programs.train_state(experiment, mesh), programs.abstract_batch(experiment, mesh)
    )
    began = time.process_time()
    lowered = programs.lower_train_step(experiment, mesh)
    lowering = time.process_time() - began
    account = compile_account(lowered, given, dict(mesh.shape))
    compiling = time.process_time() - began - lowering
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return [
        name,
        "one after another" if unroll else "a loop",
        f"{lowering:.1f}",
        f"{compiling:.1f}",
        f"{most:.1f}",
        f"{account.needed / 1e9:.1f}",
        f"{account.cost.bytes / 1e9:.1f}",
    ]


def main(argv: list[str]) -> None:
    """Prints the table, and without a topology the ratio of step times."""
    del argv
    rows = []
    for name in _CONFIGS.value:  # a wrong name ends the command before anything is compiled
        config_of(name, _TOPOLOGY.value, False)
    spawn = multiprocessing.get_context("spawn")
    for name in _CONFIGS.value:
        for unroll in (False, True):
            with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
                rows.append(pool.submit(measured, name, _TOPOLOGY.value, unroll).result())
            logging.info("%s", ", ".join(map(" ".join, zip(rows[-1], HEADER, strict=True))))
    print(markdown(rows, HEADER))
    if _TOPOLOGY.value:
        return
    for name in _CONFIGS.value:
        steps = {unroll: TimedStep(config_of(name, "", unroll)) for unroll in (False, True)}
        medians = time_in_turn(steps, _ROUNDS.value, warm_up=2)
        ratio = medians[False] / medians[True]
        print(f"{name}: a step with the loop takes {ratio:.3f} times as long as one without")


if __name__ == "__main__":
    app.run(main)
