"""Tests that set every key of every shipped config to arbitrary values on the command line."""

import contextlib
import io
import logging
import math
import pathlib

import numpy as np
import pytest
from absl import flags
from fuzzing import fuzz
from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from conprediff_jax.cli import app, config_flag, trouble
from conprediff_jax.common.errors import ConfigError
from conprediff_jax.common.trees import flatten
from conprediff_jax.config import default
from conprediff_jax.config.experiment import make_experiment

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").rglob("*.py"))
# Types of elements, where a tuple is empty.
LONE = {
    **{"keep": str, "class_names": str, "imports": str},
    **{"attention_downsampling": int, "stride_weights": float, "power_averages": float},
}
NASTY = (
    *("None", "none", "", " ", "nan", "inf", "-inf", "1e400", "1e39", "99999999999", "-1", "0"),
    *("1.5", "True", "no", "maybe", "()", "(", "(1,", "1,2", "(1, 'a')", "[1, 2]", "{}", "{1}"),
    *("'a'", "('a', 'b')", "a,b", "((1,),)", "b'a'", "(None,)", "é\u2028", "\udcff", "=", "--x"),
    *("0x10", "1_000", "1" * 5000, "(" * 5000, "lambda: 0", "__import__('os')", "ConfigDict()"),
)


@pytest.fixture
def parsed(monkeypatch):
    """What the commands' own parser makes of a config and of keys: a config, or its message."""
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    holder = config_flag.define()

    def parse(file: pathlib.Path, *arguments: str) -> ConfigDict | str:
        values.unparse_flags()
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                app._parse_flags(["command", f"--config={file}", *arguments])
        except SystemExit as end:
            assert end.code == 2
            return said.getvalue()
        return holder.value

    yield parse
    logging.disable(logging.NOTSET)  # a command logs nothing after its last message


def keys(config: ConfigDict, prefix: str = "") -> dict[str, tuple[type, type | None, bool]]:
    """The type of every key, that of its elements, and whether it may be None."""
    found = {}
    for name, value in config.items(preserve_field_references=True):
        if isinstance(value, ConfigDict):
            found |= keys(value, f"{prefix}{name}.")
            continue
        optional = isinstance(value, FieldReference) or name in ("scale", "used_codes")
        kind, value = config.get_type(name), config[name]
        kind = tuple if kind is list else kind
        element = LONE.get(name, type(value[0]) if value else int) if kind is tuple else None
        found[prefix + name] = kind, element, optional
    return found


def is_legal(value, kind: type, element: type | None, optional: bool) -> bool:
    if value is None:
        return optional
    if kind is tuple:
        return type(value) is tuple and all(is_legal(v, element, None, False) for v in value)
    return type(value) is kind and (kind is not float or math.isfinite(value))


def one(kind: type, rng: np.random.Generator):
    if kind is bool:
        return bool(rng.integers(2))
    if kind is int:
        return int(rng.integers(-2, 40))
    if kind is float:
        return float(rng.choice([rng.normal(), rng.uniform(), 10.0 ** rng.integers(-9, 9), 0.0]))
    return str(rng.choice(["", "a", "learned", "cosine", "a b, c", "./None", "ä", "100:110"]))


def legal(kind: type, element: type | None, optional: bool, rng: np.random.Generator):
    """A value that the key may have, by its type."""
    if optional and rng.random() < 0.2:
        return None
    if kind is tuple:
        many = 2 if element is float else rng.integers(0, 4)  # an interval
        return tuple(one(element, rng) for _ in range(many))
    return one(kind, rng)


def test_every_key_takes_what_is_legal_and_refuses_the_rest_in_a_sentence(parsed):
    def check(rng: np.random.Generator) -> None:
        file = FILES[rng.integers(len(FILES))]
        found = keys(parsed(file))
        key = sorted(found)[rng.integers(len(found))]
        kind, element, optional = found[key]
        before = flatten(parsed(file).to_dict())
        nasty = rng.random() < 0.5
        value = NASTY[rng.integers(len(NASTY))] if nasty else legal(kind, element, optional, rng)
        config = parsed(file, f"--config.{key}={value}")
        if isinstance(config, str):
            assert nasty or (key == "seed" and value < 0), f"{key}={value!r}: {config}"
            assert config.count("\n") == 1 and config.startswith(f"error: --config.{key} is ")
            return
        after = flatten(config.to_dict())
        changed = after.pop(key), before.pop(key)
        assert after == before
        stored = config
        for name in key.split("."):
            stored = stored[name]
        assert is_legal(stored, kind, element, optional), f"{key}={value!r} became {stored!r}"
        if nasty:
            assert kind in (str, tuple) or stored in (None, True, False) or str(stored) != "nan"
            assert kind is not str or stored in (value, None)
            return
        expected = list(value) if isinstance(value, tuple) else value
        assert changed[0] == expected
        with contextlib.suppress(ConfigError):  # whatever else is raised ends a command badly
            make_experiment(config)

    fuzz(check, few=60)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config.data.label=None"], {"data.label": None}),
        (["--config.model.num_heads=2", "--config.model.head_channels=None"],
         {"model.num_heads": 2, "model.head_channels": None}),
        (["--config.data.flip=no"], {"data.flip": False}),
        (["--config.data.flip", "--config.train.steps", "7"],
         {"data.flip": True, "train.steps": 7}),
        (["--noconfig.data.flip"], {"data.flip": False}),
        (["--config.context.strides=(1, 5)", "--config.context.strides=2"],
         {"context.strides": [2]}),
        (["--config.data.keep=caption"], {"data.keep": ["caption"]}),
        (["--config.seed=4294967295"], {"seed": 2**32 - 1}),
        (["--config.train.steps=3", "--config.train.steps=5"], {"train.steps": 5}),
        (["--config.train.steps=1e4", "--config.context.strides=(1e0, 2)"],
         {"train.steps": 10_000, "context.strides": [1, 2]}),
    ],
)  # fmt: skip
def test_keys_are_set_to_what_is_said(parsed, arguments, expected):
    found = flatten(parsed(ROOT / "configs/openmoji.py", *arguments).to_dict())
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.data.flip=maybe", "config.data.flip is 'maybe': it must be True or False"),
        ("--config.seed=-1", "config.seed is '-1': it must be a whole number from 0 to 4294967295"),
        ("--config.data.nam=a", "config.data has no key 'nam': did you mean 'name'?"),
        ("--config.optimizer.lr=1", "config.optimizer has no key 'lr': did you mean 'learning_r"),
        ("--config.model.dtype=1", "config.model has no key 'dtype': did you mean config.dtype?"),
        ("--config.train.steps=1.5", "config.train.steps is '1.5': it must be a whole number"),
        ("--config.data=a", "config.data is a section: set its keys, as config.data."),
        ("--config.data.name.x=a", "config.data.name is no section"),
        ("--config.train.init_from=None", "config.train.init_from is 'None': it must be a text"),
    ],
)
def test_what_cannot_be_set_is_one_sentence(parsed, argument, message):
    said = parsed(ROOT / "configs/openmoji.py", argument)
    assert said.startswith(f"error: --{message}") and said.count("\n") == 1


def test_errors_of_the_machine_say_what_to_do(parsed, monkeypatch):
    full = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 68719476736 bytes.")
    parsed(ROOT / "configs/openmoji.py", "--config.train.batch_size=64")
    monkeypatch.setattr(trouble.jax, "device_count", lambda: 4)
    assert trouble.explain(full) == (
        "cpu is out of memory when it asked for 64.00 GiB; a step takes 64 examples, 64 at a time "
        "on 4 devices: try --config.train.microbatches=2 for the same training, or "
        "--config.model.remat=True, which takes a third more time, or --config.mesh.fsdp=4, which "
        "divides the parameters, or --config.train.batch_size=32"
    )
    values = flags.FlagValues()
    flags.DEFINE_integer("batch_size", 48, "Images at a time.", flag_values=values)
    values.mark_as_parsed()
    monkeypatch.setattr(flags, "FLAGS", values)
    assert trouble.explain(full).endswith("on 48 images at a time: try --batch_size=24")
    assert trouble.explain(MemoryError()).startswith("cpu is out of memory; it works on 48")
    busy = RuntimeError("FAILED_PRECONDITION: DNN library initialization failed.")
    assert "nvidia-smi" in trouble.explain(busy)
    assert trouble.explain(RuntimeError("a defect")) is trouble.explain(KeyError("a")) is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimizer.b2", "2", r"config\.optimizer\.b2 is 2\.0: it must lie in \[0, 1\)"),
        ("optimizer.b1", "1", r"config\.optimizer\.b1 is 1\.0: it must lie in \[0, 1\)"),
        ("optimizer.epsilon", "-1e-8", r"config\.optimizer\.epsilon is -1e-08: it must be at leas"),
        ("optimizer.epsilon", "1e-300", r"config\.optimizer\.epsilon is 1e-300: it must be at lea"),
        ("sampling.clip", "-1", r"config\.sampling\.clip is -1\.0: it must be positive, or 0"),
        ("context.epsilon", "0", "config.context: epsilon is 0.0: it must be positive"),
    ],
)
def test_values_that_cannot_be_right_are_refused(parsed, key, value, message):
    config = parsed(ROOT / "configs/openmoji.py", f"--config.{key}={value}", "--config.seed=3")
    with pytest.raises(ConfigError, match=message):
        make_experiment(config)


def test_values_of_a_config_file_are_checked_as_well():
    for key, value, message in [
        ("optimizer.learning_rate", math.nan, "is nan: it must be a finite number"),
        ("optimizer.clip_norm", math.inf, "is inf: it must be a finite number"),
        ("sampling.guidance_interval", (0.0, math.nan), "it must be 2 finite numbers"),
        ("seed", -1, "config.seed is -1: it must be a whole number from 0 to 4294967295"),
        ("train.steps", 2**40, "it must be a whole number of 32 bits"),
    ]:
        config = default()
        with config.ignore_type():
            config.update_from_flattened_dict({key: value})
        with pytest.raises(ConfigError, match=message):
            make_experiment(config)
