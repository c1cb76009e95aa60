"""What a run keeps when it goes on, though its data may have changed: vocabulary and classes.

Both are put into the config before anything is made, `config.text.vocabulary` and
`config.data.class_names`, and every checkpoint carries them.
"""

from ml_collections import ConfigDict

from conprediff_jax import data
from conprediff_jax.common.errors import ConfigError
from conprediff_jax.config.experiment import Experiment, make_experiment
from conprediff_jax.config.vocabulary import with_vocabulary_of
from conprediff_jax.runs.checkpoint import newest_config


def with_stored_vocabulary(config: ConfigDict, workdir: str) -> ConfigDict:
    """The config with the vocabulary of the run or model that it goes on from, where it has none.

    Raises:
        ConfigError: A key does not fit.
    """
    paths = filter(None, (workdir, config.train.init_from))
    return with_vocabulary_of(config, map(newest_config, paths))


def with_class_names(config: ConfigDict, workdir: str) -> ConfigDict:
    """The config with the names of its classes, by number; the same one where no classes are read.

    They are those of the run that it goes on with, or else those that the data have now.

    Raises:
        ConfigError: It does not fit itself, or names other classes than that run.
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
