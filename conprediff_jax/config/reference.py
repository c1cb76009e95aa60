"""What every key of a config means, read from the docstrings of the sections' classes."""

import collections
import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from docstring_parser import google
from ml_collections import ConfigDict

from conprediff_jax.common import keys
from conprediff_jax.config import first_stage
from conprediff_jax.config.experiment import DTYPES, make_experiment
from conprediff_jax.config.sections import SHARED, TASKS, classes, completed
from conprediff_jax.diffusion import PROCESSES
from conprediff_jax.models import DENOISERS, FIRST_STAGES
from conprediff_jax.models.text import TEXT_ENCODERS
from conprediff_jax.objectives import TERMS, ContextTerm
from conprediff_jax.sampling.model import ConditionSpec
from conprediff_jax.sampling.spec import SAMPLINGS
from conprediff_jax.sampling.text import TextCondition
from conprediff_jax.tasks.first_stage import FirstStageLoss

# Where the builder takes the fields from that are no keys (`keys.derived`).
SOURCES = {
    "out_channels": "config.first_stage and config.data.channels",
    "channels": "config.data.channels",
    "num_codes": "config.first_stage",
    "model": "config.first_stage.autoencoder",
    "grid": "config.first_stage and config.data.image_size",
    "encoder": "config.text.encoder",
    "text_dim": "config.text.encoder.width",
    "learned_null": "config.condition",
    "num_steps": "config.process",
    "share": "config.process",
    "alpha_bar": "config.process",
    "dtype": "config.dtype",
    "steps": "config.train",
}

PACKAGE = "conprediff_jax."

_WIDTH = 100
_COLUMN = 34  # where meanings begin


def meanings(cls: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each field, each in one line.

    Args:
        cls: A dataclass or Flax module whose docstring has a section `Attributes:`.
    """
    found = {}
    for base in reversed(cls.__mro__):
        parts = google.parse(vars(base).get("__doc__") or "").meta
        found |= {
            part.args[1]: " ".join(part.description.split())
            for part in parts
            if part.args[0] == "attribute"
        }
    return found


def kinds() -> dict[str, tuple[str, ...]]:
    """The choices of the keys that choose a class, by the keys' paths without 'config.'."""
    return {
        "task": tuple(TASKS),
        "first_stage.kind": tuple(FIRST_STAGES),
        "process.kind": tuple(PROCESSES),
        "model.kind": tuple(DENOISERS),
        "text.kind": ("none", *TEXT_ENCODERS),
    }


def top() -> dict[str, str]:
    """What the keys outside all sections mean."""
    return {
        "task": f"What is trained: {_one_of(kinds()['task'])}.",
        "seed": "Seed of all random streams.",
        "dtype": f"Type of activations: {_one_of(DTYPES)}. Parameters are float32.",
        "imports": "Modules that register kinds of their own, by their dotted names.",
    }


def printed(config: ConfigDict) -> str:
    """A config with all its values, the meaning of every key, and what follows from other keys.

    Args:
        config: A whole config.

    Raises:
        ConfigError: A key is unknown or has a wrong value.
    """
    make_experiment(config)
    config = completed(config)
    found = classes(config)
    lines = ["config", *_entries(config, top())]
    for path, section in _sections(config):
        cls = found.get(path)
        said = meanings(cls) if cls else {}
        if choices := kinds().get(f"{path}.kind"):
            said = {"kind": f"{_one_of(choices)}.", **said}
        lines += ["", f"config.{path}", *_entries(section, said)]
        for name in keys.derived_names(cls) if cls else ():
            meaning = f"Follows from {_source(name)}. {said.get(name, '')}"
            lines += _entry(f"({name})", meaning)
    return "\n".join(lines)


def page() -> str:
    """The keys of all sections and kinds, in Markdown."""
    lines = ["### `config`", ""]
    lines += ["| key | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in top().items()]
    for cls, titles in _all_classes().items():
        lines += ["", f"### {', '.join(titles)}", ""]
        lines += ["| key | default | when a run continues | meaning |", "|---|---|---|---|"]
        lines += [_row(field, cls) for field in keys.keys_of(cls)]
        if derived := [f"`{name}`" for name in keys.derived_names(cls)]:
            sources = dict.fromkeys(map(_source, keys.derived_names(cls)))
            verb = "follows" if len(derived) == 1 else "follow"
            lines += ["", f"{', '.join(derived)} {verb} from {', '.join(sources)}."]
    return "\n".join(lines)


def _all_classes() -> dict[type, list[str]]:
    """The class of every section and kind of this package, with its titles in the list."""
    found = collections.defaultdict(list)
    for name, cls in SHARED.items():
        found[cls].append(f"`config.{name}`")
    for kind, (stage, autoencoder) in FIRST_STAGES.items():
        found[stage].append(f"`config.first_stage` of kind `{kind}`")
        if autoencoder:
            found[autoencoder].append(f"`config.first_stage.autoencoder` of kind `{kind}`")
    for kind in first_stage.KINDS:
        found[FIRST_STAGES[kind].autoencoder].append(f"`config.autoencoder` of task `{kind}`")
    registries = {"process": PROCESSES, "model": DENOISERS, "text.encoder": TEXT_ENCODERS}
    for name, registry in registries.items():
        for kind, cls in registry.items():
            found[cls].append(f"`config.{name}` of kind `{kind}`")
    for kind, cls in SAMPLINGS.items():
        found[cls].append(f"`config.sampling` of a process of kind `{kind}`")
    alone = {"text": TextCondition, "condition": ConditionSpec, "context": ContextTerm}
    for name, cls in (alone | {"loss": FirstStageLoss}).items():
        found[cls].append(f"`config.{name}`")
    for kind, cls in TERMS.items():
        found[cls].append(f"`config.terms.NAME` of kind `{kind}`")
    # Kinds that others register are not in this project's documentation.
    return {cls: titles for cls, titles in found.items() if cls.__module__.startswith(PACKAGE)}


def _row(field: dataclasses.Field, cls: type) -> str:
    role = "fixed" if field.name in keys.fixed_names(cls) else "free"
    if field.name in keys.switch_names(cls):
        role = "free, but not between nothing and something"
    default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
    meaning = meanings(cls).get(field.name, "").replace("|", r"\|")
    return f"| `{field.name}` | {default} | {role} | {meaning} |"


def _sections(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, ConfigDict]]:
    """All sections with their paths, a section before those in it."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield prefix + name, value
            yield from _sections(value, f"{prefix}{name}.")


def _entries(section: ConfigDict, said: dict[str, str]) -> list[str]:
    return [
        line
        for name, value in section.items()
        if not isinstance(value, ConfigDict)
        for line in _entry(f"{name} = {_shown(value)}", said.get(name, ""))
    ]


def _entry(left: str, meaning: str) -> list[str]:
    """The lines of a key: its value on the left, its meaning on the right."""
    lines = textwrap.wrap(meaning, _WIDTH - _COLUMN) or [""]
    if len(left) > _COLUMN - 4:
        return [f"  {left}", *(" " * _COLUMN + line for line in lines)]
    first, *rest = lines
    return [f"  {left:<{_COLUMN - 2}}{first}".rstrip(), *(" " * _COLUMN + line for line in rest)]


def _shown(value: Any) -> str:
    return textwrap.shorten(repr(value), _WIDTH - 30, placeholder=" ...")


def _one_of(choices: tuple[str, ...]) -> str:
    return " or ".join(filter(None, (", ".join(map(repr, choices[:-1])), repr(choices[-1]))))


def _source(name: str) -> str:
    return SOURCES.get(name, "other sections")
