"""The plan of an experiment on a slice: accounts of its programs, and the cost of context loss."""

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
OFF = "off"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a config needs on a slice.

    Attributes:
        topology: The slice.
        mesh: Sizes of the mesh's axes.
        batch_size: Examples of a step, over all chips.
        microbatches: Number of parts in which a batch is computed.
        remat: What blocks keep that are computed again in the backward pass, a key of
            `REMAT_POLICIES`; 'off' where activations are kept.
        attention: The kernel of attention, `model.attention`; '' for a model without one.
        divide_update: Whether the axis `data` divides the update of the weights.
        train: The account of the train step.
        plain: The account of the train step without context prediction; None if it was not made.
        sampler: The account of the sampler; None if it was not made.
        sampled: Number of images that the sampler draws at a time.
    """

    topology: Topology
    mesh: dict[str, int]
    batch_size: int
    microbatches: int
    remat: str
    attention: str
    divide_update: bool
    train: Account
    plain: Account | None = None
    sampler: Account | None = None
    sampled: int = 0

    @property
    def roofline(self) -> Roofline:
        """The roofline of the train step."""
        return roofline(self.train, self.topology.chip)

    @property
    def images_per_second(self) -> float:
        """Images a second that training can read at best; 0 where the train step does not fit."""
        return self.batch_size / self.roofline.step if self.train.fits else 0.0

    @property
    def context_share(self) -> dict[str, float] | None:
        """The share of the train step that is due to context prediction, by figure.

        `collectives` is a number and no share. None where the step without context prediction was
        not compiled, or one of the two does not fit.
        """
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
        """All fields and the figures that are derived from them, in types that JSON has."""
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
            "attention": self.attention,
            "divide_update": self.divide_update,
            "sampled": self.sampled,
            "images_per_second": self.images_per_second,
            "context_share": self.context_share,
            **programs_,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Plan":
        """Makes a plan from the dict of `as_dict`, also after a trip through JSON.

        Args:
            values: The dict. Derived figures in it are ignored and derived again.
        """
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
    """Compiles the programs of a config for a slice.

    Args:
        config: The config of a training run.
        topology: The slice.
        context_share: Whether to compile the train step without context prediction too.
        sampler: Whether to compile the sampler too.

    Raises:
        ConfigError: The config contradicts itself, or does not fit the slice.
        UserError: libtpu is not installed, or knows no such slice.
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
    logging.info("compiling the train step for %s (a large model takes minutes)", topology)
    train = compile_account(programs.lower_train_step(experiment, mesh), given, shape)
    plain = drawing = None
    task = experiment.task
    if context_share and train.fits and isinstance(task, Denoising) and task.context:
        without = config.copy_and_resolve_references()
        without.context.weight = 0.0
        plain_experiment = make_experiment(without)
        logging.info("compiling the train step without context prediction")
        given = memory_lib.arguments(
            programs.train_state(plain_experiment, mesh),
            programs.abstract_batch(plain_experiment, mesh),
        )
        plain = compile_account(programs.lower_train_step(plain_experiment, mesh), given, shape)
    model = config.get("model", {})
    sampled = topology.chips * 4
    if sampler:
        logging.info("compiling the sampler for %d images at a time", sampled)
        average, frozen = programs.sampler_state(experiment, mesh)
        given = Memory(
            average=memory_lib.shard_bytes(average), own_state=memory_lib.shard_bytes(frozen)
        )
        drawing = compile_account(programs.lower_sampler(experiment, mesh, sampled), given, shape)
    return Plan(
        topology=topology,
        mesh=shape,
        batch_size=experiment.train.batch_size,
        microbatches=experiment.train.microbatches,
        remat=model.get("remat_policy", "nothing") if model.get("remat") else OFF,
        attention=model.get("attention", ""),
        divide_update=experiment.train.divide_update,
        train=train,
        plain=plain,
        sampler=drawing,
        sampled=sampled if sampler else 0,
    )
