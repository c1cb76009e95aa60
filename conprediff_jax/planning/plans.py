"""The plan of an experiment on a slice: its programs' accounts, and what the context loss adds."""

import dataclasses
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from conprediff_jax import parallel
from conprediff_jax.config import sections as config_lib
from conprediff_jax.config.experiment import check_devices, make_experiment
from conprediff_jax.config.vocabulary import with_any_vocabulary
from conprediff_jax.planning import memory as memory_lib
from conprediff_jax.planning import programs
from conprediff_jax.planning.account import Account, Roofline, compile_account, roofline
from conprediff_jax.planning.memory import Memory
from conprediff_jax.planning.topology import Topology
from conprediff_jax.tasks.denoising import Denoising

CHIPS_PER_HOST = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a config does on a slice.

    Attributes:
        topology: the slice.
        mesh: sizes of the mesh's axes.
        batch_size: examples a step, over all chips.
        microbatches: parts it is computed in.
        remat: whether activations are computed twice rather than kept.
        train: the train step.
        plain: the train step without context prediction; None where it is not asked for.
        sampler: the sampler; likewise.
        sampled: images it draws at a time.
    """

    topology: Topology
    mesh: dict[str, int]
    batch_size: int
    microbatches: int
    remat: bool
    train: Account
    plain: Account | None = None
    sampler: Account | None = None
    sampled: int = 0

    @property
    def roofline(self) -> Roofline:
        """Of the train step."""
        return roofline(self.train, self.topology.chip)

    @property
    def images_per_second(self) -> float:
        """Trained on, at best; 0 where the plan does not fit."""
        return self.batch_size / self.roofline.step if self.train.fits else 0.0

    @property
    def context_share(self) -> dict[str, float] | None:
        """What context prediction adds, as a share of the whole step; `collectives` is a number."""
        if self.plain is None or not (self.train.fits and self.plain.fits):
            return None
        train, plain = self.train, self.plain

        def share(whole: float, rest: float) -> float:
            return (whole - rest) / whole if whole else 0.0

        return {
            "FLOPs": share(train.cost.flops, plain.cost.flops),
            "HBM bytes": share(train.cost.bytes, plain.cost.bytes),
            "FLOPs by XLA": share(train.xla.flops, plain.xla.flops),
            "bytes accessed by XLA": share(train.xla.bytes, plain.xla.bytes),
            "collective bytes": share(train.payload, plain.payload),
            "memory": share(float(train.memory.total), float(plain.memory.total)),
            "collectives": train.operations - plain.operations,
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON: everything, the derived figures included."""
        programs_ = {}
        for name in ("train", "plain", "sampler"):
            account = getattr(self, name)
            if account is not None:
                collectives = [dataclasses.asdict(c) for c in account.collectives]
                programs_[name] = dataclasses.asdict(account) | {"traffic": account.traffic}
                programs_[name]["collectives"] = collectives
                times = roofline(account, self.topology.chip)
                programs_[name]["roofline"] = dataclasses.asdict(times) | {"step": times.step}
        return {
            "topology": str(self.topology),
            "chips": self.topology.chips,
            "mesh": self.mesh,
            "batch_size": self.batch_size,
            "microbatches": self.microbatches,
            "remat": self.remat,
            "sampled": self.sampled,
            "images_per_second": self.images_per_second,
            "context_share": self.context_share,
            **programs_,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Plan":
        """Of what `as_dict` gave, from JSON or not; derived figures are derived anew."""
        given = {
            field.name: values[field.name]
            for field in dataclasses.fields(cls)
            if field.name in values
        }
        given["topology"] = Topology.parse(values["topology"])
        for name in ("train", "plain", "sampler"):
            if name in given:
                given[name] = Account.from_dict(given[name])
        return cls(**given)


def make_plan(
    config: ConfigDict, topology: Topology, *, context_share: bool = True, sampler: bool = True
) -> Plan:
    """Compiles a config's programs for a slice.

    Args:
        config: of a training run.
        topology: where it would train.
        context_share: whether to compile the step without context prediction too.
        sampler: whether to compile the sampler too.

    Raises:
        ConfigError: the config does not fit itself, or the slice.
        UserError: there is no libtpu, or no such slice.
    """
    config = with_any_vocabulary(config)
    experiment = make_experiment(config)
    devices = topology.devices()
    hosts = max(1, topology.chips // CHIPS_PER_HOST)
    check_devices(experiment, topology.chips, hosts)
    with config_lib.naming("config.mesh"):
        mesh = parallel.make_mesh(experiment.mesh, devices)
    shape = dict(mesh.shape)
    given = memory_lib.arguments(
        programs.train_state(experiment, mesh), programs.abstract_batch(experiment, mesh)
    )
    logging.info("compiling the train step for %s: minutes, for a large model", topology)
    train = compile_account(programs.lower_train_step(experiment, mesh), given, shape)
    plain = drawn = None
    task = experiment.task
    if context_share and train.fits and isinstance(task, Denoising) and task.context:
        without = config.copy_and_resolve_references()
        without.context.weight = 0.0
        bare = make_experiment(without)
        logging.info("compiling it without context prediction")
        given = memory_lib.arguments(
            programs.train_state(bare, mesh), programs.abstract_batch(bare, mesh)
        )
        plain = compile_account(programs.lower_train_step(bare, mesh), given, shape)
    sampled = topology.chips * 4
    if sampler:
        logging.info("compiling the sampler, %d images", sampled)
        average, frozen = programs.sampler_state(experiment, mesh)
        given = Memory(
            average=memory_lib.shard_bytes(average), own_state=memory_lib.shard_bytes(frozen)
        )
        drawn = compile_account(programs.lower_sampler(experiment, mesh, sampled), given, shape)
    return Plan(
        topology=topology,
        mesh=shape,
        batch_size=experiment.train.batch_size,
        microbatches=experiment.train.microbatches,
        remat=bool(config.get("model", {}).get("remat", False)),
        train=train,
        plain=plain,
        sampler=drawn,
        sampled=sampled if sampler else 0,
    )
