"""The vocabulary and the classes of a run, which stay the same although its data may change.

Both are stored in the config before anything is built, in `config.text.vocabulary` and
`config.data.class_names`, and every checkpoint holds them.
"""

from ml_collections import ConfigDict

from conprediff_jax import data
from conprediff_jax.common.errors import ConfigError
from conprediff_jax.config.experiment import Experiment, make_experiment
from conprediff_jax.config.vocabulary import with_vocabulary_of
from conprediff_jax.runs.checkpoint import newest_config


def with_stored_vocabulary(config: ConfigDict, workdir: str) -> ConfigDict:
    """The config with the vocabulary of the run or model that it continues, if it lacks its own.

    Raises:
        ConfigError: A key has a wrong value.
    """
    paths = filter(None, (workdir, config.train.init_from))
    return with_vocabulary_of(config, map(newest_config, paths))


def with_class_names(config: ConfigDict, workdir: str) -> ConfigDict:
    """The config with the names of its classes, in order; unchanged if labels are not read.

    The names come from the run in the workdir, or else from the data.

    Raises:
        ConfigError: The config is wrong, or it names other classes than the run in the workdir.
        DataError: The data are missing.
    """
    experiment = make_experiment(config)
    if not experiment.task.num_classes:
        return config
    given = tuple(experiment.data.class_names)
    stored = tuple((newest_config(workdir) or {}).get("data", {}).get("class_names", ()))
    if given and stored and given != stored:
        raise ConfigError(
            f"config.data.class_names are {', '.join(given)}; the run in {workdir} has numbered "
            f"{', '.join(stored)}"
        )
    config = ConfigDict(config.copy_and_resolve_references())
    with config.unlocked():
        config.data.class_names = given or stored or _of(experiment)
    return config


def _of(experiment: Experiment) -> tuple[str, ...]:
    return data.open_data(experiment.data).class_names or ()
