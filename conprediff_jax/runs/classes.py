"""The vocabulary and the classes of a run, which stay the same although its data may change.

Both are stored in the config before anything is built, in `config.text.vocabulary` and
`config.data.class_names`, and every checkpoint holds them.
"""

from ml_collections import ConfigDict

from conprediff_jax import data
from conprediff_jax.config.experiment import Experiment, make_experiment
from conprediff_jax.config.vocabulary import with_vocabulary_of
from conprediff_jax.runs.checkpoint import newest_config


def with_stored_vocabulary(config: ConfigDict, stored: dict | None) -> ConfigDict:
    """The config with the vocabulary of the run or model that it continues, if it lacks its own.

    Args:
        config: The config.
        stored: The config of the run that continues; None for a run that begins.

    Raises:
        ConfigError: A key has a wrong value.
    """
    first = config.train.init_from
    return with_vocabulary_of(config, [stored, newest_config(first) if first else None])


def with_class_names(config: ConfigDict, stored: dict | None) -> ConfigDict:
    """The config with the names of its classes, in order; unchanged if labels are not read.

    Names that the config does not give come from the run that continues, or else from the data.

    Args:
        config: The config.
        stored: The config of the run that continues; None for a run that begins.

    Raises:
        ConfigError: The config is wrong.
        DataError: The data are missing.
    """
    experiment = make_experiment(config)
    if not experiment.task.num_classes:
        return config
    given = tuple(experiment.data.class_names)
    numbered = tuple((stored or {}).get("data", {}).get("class_names", ()))
    config = ConfigDict(config.copy_and_resolve_references())
    with config.unlocked():
        config.data.class_names = given or numbered or _of(experiment)
    return config


def _of(experiment: Experiment) -> tuple[str, ...]:
    return data.open_data(experiment.data).class_names or ()
