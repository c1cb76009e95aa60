"""Sections of a config, and how each one becomes an object.

A config is plain ml_collections data with one section for each object that is built. The keys of a
section are fields of a dataclass or Flax module, with their defaults; `common.keys` says which
fields are keys. `build` turns a section into its object. If a value does not fit, it names the key,
so that a config is checked before anything expensive is made.
"""

import contextlib
import dataclasses
import functools
import importlib
import operator
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from conprediff_jax.common import keys, random
from conprediff_jax.common.errors import ConfigError, FieldError
from conprediff_jax.common.fields import conform, parse
from conprediff_jax.common.names import did_you_mean
from conprediff_jax.common.registry import Registry
from conprediff_jax.common.trees import flatten
from conprediff_jax.data import DataSpec
from conprediff_jax.parallel import MeshSpec
from conprediff_jax.tasks.optimizer import OptimizerSpec
from conprediff_jax.tasks.spec import TrainSpec
from conprediff_jax.tasks.task import Task

T = TypeVar("T")

# Sections that every task has. Configs also have the keys `task`, `seed`, `dtype` and `imports`.
SHARED = {"data": DataSpec, "optimizer": OptimizerSpec, "train": TrainSpec, "mesh": MeshSpec}

_SHOWN = 200  # characters of a value in messages

_ROLES_AT_THE_TOP = {"task": "fixed", "seed": "guarded"}


class TaskKind(NamedTuple):
    """A kind of task, which `config.task` names.

    Attributes:
        completed: A function that adds what checkpoints of older versions lack to a config. It
            raises ConfigError for a section that the task does not have.
        classes: A function from a config to the class of each of the task's sections, by path.
        make: A function from a config, its `data` object and its `train` object to the task.
        open_sections: The kinds of the entries of sections that may have any number of entries, by
            the path of the section.
    """

    completed: Callable[[ConfigDict], ConfigDict]
    classes: Callable[[ConfigDict], dict[str, type]]
    make: Callable[[ConfigDict, DataSpec, TrainSpec], Task]
    open_sections: Mapping[str, Registry[type]] = MappingProxyType({})


TASKS: Registry[TaskKind] = Registry("task")


def whole(task: str, **sections: ConfigDict) -> ConfigDict:
    """A locked config with the sections of a task and those that every task has."""
    config = ConfigDict(
        {
            "task": task,
            "seed": 0,
            "dtype": "float32",  # of activations: 'float32' or 'bfloat16'
            "imports": (),  # modules that register kinds of their own, by their dotted names
            "data": section(DataSpec, name="openmoji/people"),
            **sections,
            **{name: section(SHARED[name]) for name in ("optimizer", "train", "mesh")},
        }
    )
    return config.lock()


def section(cls: type, *, kind: str | None = None, **values: Any) -> ConfigDict:
    """A section with the keys of a dataclass or Flax module, and its defaults.

    A key that may be None is a reference with a type, so that values set later are checked. One of
    several types is checked when the object is built.

    Args:
        cls: The class whose fields are the keys.
        kind: Name under which the class is registered, for sections that have a kind.
        **values: Values of keys that are not the defaults.
    """
    entries = {} if kind is None else {"kind": kind}
    for field in keys.keys_of(cls):
        entries[field.name] = values.pop(field.name, field.default)
        if entries[field.name] is dataclasses.MISSING:
            raise TypeError(f"section {cls.__name__} needs a value for {field.name}")
        if isinstance(field.type, types.UnionType):
            inner, *others = [a for a in field.type.__args__ if a is not types.NoneType]
            inner = object if others else tuple if typing.get_origin(inner) else inner
            entries[field.name] = FieldReference(entries[field.name], field_type=inner)
    assert not values, f"{cls.__name__} has no {', '.join(values)}"
    return ConfigDict(entries)


def build(
    cls: type[T], config: ConfigDict, name: str, *, others: tuple[str, ...] = (), **derived: Any
) -> T:
    """Builds a section's object.

    Args:
        cls: Dataclass or Flax module whose fields are the section's keys.
        config: The whole config.
        name: Name of the section; of a section in a section, both with a dot between them.
        others: Keys of the section that are not fields of the class.
        **derived: Values that follow from other sections. The class takes those of the fields that
            it marks as derived.

    Raises:
        ConfigError: A key is unknown or a value does not fit; the message names section and key.
    """
    known = [field.name for field in keys.keys_of(cls)]
    try:
        found = _at(config, name)
    except KeyError:
        raise ConfigError(
            f"there is no section config.{name}, which its kind needs: the config file has to make "
            "it by one of the functions of conprediff_jax.config"
        ) from None
    check_keys(found, [*others, *known], f"config.{name}")
    values = {key: _plain(value) for key, value in found.items() if key not in others}
    taken = {name: derived[name] for name in keys.derived_names(cls) if name in derived}
    with naming(f"config.{name}"):
        return cls(**conform(cls, values), **taken)


def build_kind(registry: Registry[type], config: ConfigDict, name: str, **derived: Any) -> Any:
    """Builds a section as `build` does, with the class that a registry has for its `kind`."""
    with naming(f"config.{name}"):
        cls = registry[_at(config, name).get("kind")]
    return build(cls, config, name, others=("kind",), **derived)


def _at(config: ConfigDict, path: str) -> Any:
    """What a config has at a path, such as 'first_stage.autoencoder'."""
    return functools.reduce(operator.getitem, path.split("."), config)


def task_kind(config: ConfigDict) -> TaskKind:
    """The kind of task that `config.task` names, after importing the modules in `config.imports`.

    Raises:
        ConfigError: There is no such task, or a module cannot be imported.
    """
    for module in config.get("imports", ()):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"config.imports names {module!r}, which cannot be imported ({error}): put the "
                "folder that holds it on PYTHONPATH"
            ) from error
    if config.get("task") not in TASKS:
        raise ConfigError(f"config.task is {config.get('task')!r}: choose one of {tuple(TASKS)}")
    return TASKS[config.task]


def completed(config: ConfigDict) -> ConfigDict:
    """The config, unlocked, with the sections and kinds that older checkpoints do not have."""
    return task_kind(config).completed(config)


def with_defaults(config: ConfigDict, default: ConfigDict) -> ConfigDict:
    """The config, unlocked, with the sections of another one that it lacks.

    Raises:
        ConfigError: The config has a section that the other one does not have.
    """
    check_keys(config, list(default), "config")
    return ConfigDict({**default, **config})


def classes(config: ConfigDict) -> dict[str, type]:
    """The class of every section, by the section's path, such as `first_stage.autoencoder`."""
    return SHARED | task_kind(config).classes(config)


class Change(NamedTuple):
    """A key that has another value in a config than in an earlier config of the same run.

    Attributes:
        key: The key, such as 'train.steps'.
        before: The earlier value; None where the earlier config does not have the key.
        now: The value; None where the config does not have the key.
        role: What the change means: the key is 'fixed', 'guarded' or 'adjustable'. A switch counts
            as fixed if it is changed between nothing and something. See `common.keys`.
    """

    key: str
    before: Any
    now: Any
    role: str

    def __str__(self) -> str:
        return f"config.{self.key} is {shown(self.now)}, and was {shown(self.before)}"


def changes(config: ConfigDict, before: ConfigDict) -> list[Change]:
    """The keys with other values than in an earlier config of the same run, by name.

    A key that a config lacks has its default.
    """
    config, before = completed(config), completed(before)
    known = classes(config) | classes(before)
    flat, flat_before = (_with_defaults(each) for each in (config, before))
    roles = _roles(known)
    found = []
    for key in sorted(flat.keys() | flat_before.keys()):
        now, was = flat.get(key), flat_before.get(key)
        if now != was:
            role = roles.get(key, "adjustable")
            if role == "switch":
                role = "adjustable" if bool(now) == bool(was) else "fixed"
            found.append(Change(key, was, now, role))
    return found


def shown(value: Any) -> str:
    """A value of a key for people to read; only the beginning of a long one."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


def _with_defaults(config: ConfigDict) -> dict[str, Any]:
    """The values of all keys by name, with the defaults of keys that the config lacks."""
    defaults = {
        f"{path}.{field.name}": field.default
        for path, cls in classes(config).items()
        for field in keys.keys_of(cls)
        if field.default is not dataclasses.MISSING
    }
    return flatten(defaults) | flatten(config.to_dict())


def _roles(known: dict[str, type]) -> dict[str, str]:
    """The roles of keys that are not just adjustable, from the classes of the sections."""
    roles = dict(_ROLES_AT_THE_TOP)
    for path, cls in known.items():
        roles[f"{path}.kind"] = "fixed"
        for role, names in (
            ("fixed", keys.fixed_names(cls)),
            ("guarded", keys.guarded_names(cls)),
            ("switch", keys.switch_names(cls)),
        ):
            roles |= {f"{path}.{name}": role for name in names}
    return roles


def override(config: ConfigDict, path: str, text: str) -> Any:
    """Sets a key to what a text of the command line says, and returns its value.

    In a section of any number of entries, such as `terms`, setting a key that is not there makes an
    entry of the kind that the text names, with the defaults of its keys.

    Args:
        config: The whole config, changed in place.
        path: Path of the key, such as 'model.channels'.
        text: The value; see `fields.parse`.

    Raises:
        ConfigError: There is no such key, or it cannot have this value.
    """
    *outer, key = path.split(".")
    found, where = config, "config"
    for name in outer:
        _check_key(config, found, name, where)
        found, where = found[name], f"{where}.{name}"
        if not isinstance(found, ConfigDict):
            raise ConfigError(f"{where} is no section: it has the value {found!r}, and no keys")
    kinds = _kinds_of_entries(config, where)
    if kinds is not None and key not in found:
        with naming(f"{where}.{key}"), found.unlocked():
            found[key] = section(kinds[text], kind=text)
        return text
    _check_key(config, found, key, where)
    if isinstance(found[key], ConfigDict):
        first = next(iter(found[key]), "key")
        raise ConfigError(f"{where}.{key} is a section: set its keys, as {where}.{key}.{first}=...")
    kind = _kinds(config, ".".join(outer)).get(key) or _kind_of(found[key])
    with naming(where), found.ignore_type():
        found[key] = parse(key, text, kind)
    return found[key]


def _check_key(config: ConfigDict, found: ConfigDict, key: str, where: str) -> None:
    """Raises ConfigError if a section has no such key, naming the sections that have it."""
    kinds = _kinds_of_entries(config, where)
    if kinds is not None and key not in found:
        raise ConfigError(
            f"{where} has no entry {key!r}: set {where}.{key} to its kind first, one of "
            f"{tuple(kinds)}"
        )
    paths = [path for path in flatten(config.to_dict()) if path.split(".")[-1] == key]
    if key not in found and paths:
        meant = " or ".join(f"config.{path}" for path in paths)
        raise ConfigError(f"{where} has no key {key!r}: did you mean {meant}?")
    check_keys([key], list(found), where)


def _kinds_of_entries(config: ConfigDict, where: str) -> Registry[type] | None:
    """The kinds of the entries of a section that may have any number; None for other sections."""
    return task_kind(config).open_sections.get(where.removeprefix("config."))


def _kind_of(value: Any) -> Any:
    """The type of a key that is not a field of a class, inferred from its value."""
    if isinstance(value, tuple | list):
        return tuple[type(value[0]) if value else str, ...]
    return str | None if value is None else type(value)


def _kinds(config: ConfigDict, path: str) -> dict[str, Any]:
    """Declared types of the keys of a section; see `fields.parse`."""
    if not path:
        return {"seed": random.SEEDS}
    cls = classes(completed(config)).get(path)
    return {field.name: field.type for field in keys.keys_of(cls)} if cls else {}


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Turns a ValueError or TypeError into a ConfigError that says where it happened."""
    try:
        yield
    except ConfigError:
        raise
    except FieldError as error:
        raise ConfigError(f"{where}.{error}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def check_keys(given: Iterable[str], known: list[str], where: str) -> None:
    """Raises ConfigError for a key that is not known, naming the nearest one that is."""
    for key in given:
        if key not in known:
            hint = did_you_mean(key, known)
            raise ConfigError(f"{where} has no key {key!r}: {hint}it has {', '.join(known)}")


def _plain(value: Any) -> Any:
    """Turns lists into tuples, so that objects are hashable, and nested sections into dicts."""
    if isinstance(value, list | tuple):
        return tuple(_plain(v) for v in value)
    return value.to_dict() if isinstance(value, ConfigDict) else value
