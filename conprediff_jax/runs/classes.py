"""The vocabulary and the classes of a run, which stay the same although its data may change.

Both are stored in the config before anything is built, in `config.text.vocabulary` and
`config.data.class_names`, and every checkpoint holds them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from conprediff_jax import data
from conprediff_jax.common.errors import FieldError, shortened
from conprediff_jax.common.fields import as_kind
from conprediff_jax.common.names import did_you_mean
from conprediff_jax.config.experiment import Experiment, make_experiment
from conprediff_jax.config.vocabulary import with_vocabulary_of
from conprediff_jax.runs.checkpoint import newest_config

Label = int | str
Numbers = int | tuple[int, ...] | None


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


def numbers_of(
    label: Label | Sequence[Label] | None, names: Sequence[str], count: int | None
) -> Numbers:
    """The numbers of the classes that images take in turn; of one class, the number alone.

    Args:
        label: The name or number of a class, or several of them, as a sequence or as a text with
            commas between them. A name comes before a number that looks alike. None for no choice.
        names: The names of the classes by number; () if they are not known.
        count: Number of classes; None for a model without classes.

    Raises:
        FieldError: There are no classes, or none of this name or number.
    """
    if label is None:
        return None
    if not count:
        raise FieldError("label", f"is {label!r}: the model knows no classes")
    if isinstance(label, str) and label not in names:
        label = [part.strip() for part in label.split(",")]
    several = label if isinstance(label, list | tuple) or np.ndim(label) else [label]
    numbers = tuple(_number_of(part, names, count) for part in several)
    if not numbers:
        raise FieldError("label", f"is {label!r}: it must name a class")
    return numbers[0] if len(numbers) == 1 else numbers


def _number_of(part: Any, names: Sequence[str], count: int) -> int:
    if not isinstance(part, str):
        return as_kind("label", part, range(count))
    if part in names:
        return list(names).index(part)
    if part.isdecimal() and int(part) < count:
        return int(part)
    known = f"the classes have no names, but numbers from 0 to {count - 1}"
    if names:
        known = f"{did_you_mean(part, names)}the classes are {shortened(names)}"
    raise FieldError("label", f"names {part!r}: {known}")


def _of(experiment: Experiment) -> tuple[str, ...]:
    return data.open_data(experiment.data).class_names or ()
