"""The flag `--config` of a config file, and `--config.section.key=value` for every key of it.

A value is read by the declared type of its key, so every value that a key may have can be given:
'None' where None is allowed, and tuples as Python writes them. The last of several values counts.
"""

import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags.config_flags import is_config_flag

NAME = "config"

flags.disclaim_key_flags()  # `--config` is a flag of the command that defines it

_HELP = (
    "Read all settings from this config file, such as configs/openmoji.py; "
    "--config.SECTION.KEY=VALUE sets one of its keys."
)

_given: dict[str, Any] = {}
_OVERRIDE = re.compile(rf"--?(no)?{NAME}\.([^=]+)(?:=(.*))?", re.DOTALL)


def define(default: str | None = None, *, lock: bool = True, help_string: str = _HELP):
    """Defines `--config`, and returns its flag holder.

    Args:
        default: The config file that is used when the command line names none.
        lock: Whether to lock the config, so that no keys can be added.
        help_string: The text of `--help`.
    """
    # ml_collections does not see the keys, and so leaves them to `split` and `apply`.
    return config_flags.DEFINE_config_file(
        NAME,
        default,
        help_string,
        flag_values=flags.FLAGS,
        lock_config=lock,
        sys_argv=split(sys.argv)[0],
    )


def is_defined() -> bool:
    """Whether this command has a flag `--config` of a config file."""
    return NAME in flags.FLAGS and is_config_flag(flags.FLAGS[NAME])


def split(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separates the keys that are set on a command line from its other arguments.

    Args:
        arguments: Arguments of the command. `--config.key=value` and `--config.key value` set a
            key, `--config.key` alone sets it to True, and `--noconfig.key` to False.

    Returns:
        The other arguments, and the values as texts, by the keys' paths without 'config.'.
    """
    rest, texts = [], {}
    waiting = list(arguments)
    while waiting and waiting[0] != "--":
        argument = waiting.pop(0)
        match = _OVERRIDE.fullmatch(argument)
        if match is None:
            rest.append(argument)
            continue
        no, path, text = match.groups()
        if text is None and no:
            text = "False"
        elif text is None:
            text = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "True"
        texts.pop(path, None)  # the last value is set last
        texts[path] = text
    return rest + waiting, texts


def apply(texts: dict[str, str]) -> None:
    """Sets keys of the config that was read.

    Args:
        texts: Values as texts, by the keys' paths without 'config.'; see `split`.

    Raises:
        ConfigError: There is no such key, or it cannot have this value.
    """
    from conprediff_jax.config.sections import (
        override,  # takes seconds, which --help can do without
    )

    for path, text in texts.items():
        _given[path] = override(flags.FLAGS[NAME].value, path, text)


def given() -> dict[str, Any]:
    """The values that the command line has set, by the keys' paths without 'config.'."""
    return dict(_given)
