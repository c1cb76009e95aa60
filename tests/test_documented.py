"""Tests that the commands, flags and config keys that the documentation names exist and start."""

import ast
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from quick import environment

from conprediff_jax.cli import choices
from conprediff_jax.cli import help as command_help
from conprediff_jax.common import keys as config_keys
from conprediff_jax.common.errors import FieldError
from conprediff_jax.config import reference
from conprediff_jax.data import fitting, masks
from conprediff_jax.diffusion import samplers
from conprediff_jax.diffusion.samplers import categorical, masked
from conprediff_jax.interop import formats
from conprediff_jax.metrics import suite
from conprediff_jax.metrics.networks import lpips
from conprediff_jax.planning import topology
from conprediff_jax.runs.classes import numbers_of
from conprediff_jax.sampling import inpainting
from conprediff_jax.train.loop import train

pytestmark = pytest.mark.usefixtures("one_device")

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "results").glob("*.md")),
]
MODULES = [
    *sorted((ROOT / "conprediff_jax").rglob("*.py")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
]
COMMANDS = [file for file in MODULES if "app.run(main" in file.read_text()]
LAUNCHERS = ["launch/local.py", "launch/gke.py", "launch/slurm.sh", "launch/tpu_vm.sh"]

MEASURES = "it measures a machine, and is run by hand"
NO_WEIGHTS = "it needs published weights; test_lpips runs the network on random ones"

# Imports what all commands need once, and then starts each in a process of its own.
START = """
import json, os, pathlib, runpy, sys
import conprediff_jax.runs.restore, conprediff_jax.train.loop

def start(file, arguments):
    sys.argv = [str(file), *arguments]
    module = ".".join(file.relative_to(root).with_suffix("").parts)
    try:
        if module.startswith("conprediff_jax"):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(file.parent))
            runpy.run_path(str(file), run_name="__main__")
    except SystemExit as end:
        return end.code or 0

assert len(os.listdir("/proc/self/task")) == 1  # no threads that a child would lack
root, out = map(pathlib.Path, sys.argv[1:])
codes = []
for name, *arguments in json.load(sys.stdin):
    said = out / str(len(codes))
    child = os.fork()
    if not child:
        file = said.open("w")
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        code = start(root / name, arguments)
        sys.stdout.flush()
        os._exit(code)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


def said_by(out, commands):
    """What commands of the repository say, [file, *arguments] each; they must succeed."""
    result = subprocess.run(
        [sys.executable, "-c", START, str(ROOT), str(out)],
        cwd=ROOT, input=json.dumps(commands), capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said = [(out / str(index)).read_text() for index in range(len(commands))]
    codes = json.loads(result.stdout)
    wrong = [said for said in zip(commands, said, codes, strict=True) if said[-1]]
    assert not wrong, wrong[0]
    return said


@pytest.fixture(scope="module")
def helps(tmp_path_factory):
    """What every command and launcher says when it is asked for help, by its file."""
    names = [str(file.relative_to(ROOT)) for file in COMMANDS]
    out = tmp_path_factory.mktemp("helps")
    said = dict(zip(names, said_by(out, [[name, "--help"] for name in names]), strict=True))
    for name in LAUNCHERS:
        interpreter = "bash" if name.endswith(".sh") else sys.executable
        shown = subprocess.run([interpreter, name, "--help"], cwd=ROOT, capture_output=True)
        assert shown.returncode == 0, shown.stderr
        said[name] = shown.stdout.decode()
    return said


def flags_of(help_text):
    switches = re.findall(r"--\[no\](\w+)", help_text)
    return {*re.findall(r"--(\w[\w-]*)", help_text), *switches, *(f"no{name}" for name in switches)}


def is_known(flag, flags):
    """Whether a flag, without its dashes, is one of some flags, or names a key of a config."""
    return flag.removeprefix("config.") in keys() if flag.startswith("config.") else flag in flags


@functools.cache
def keys():
    """Every key that a config file of the repository has."""
    found = set()
    for file in (ROOT / "configs").rglob("*.py"):
        names = {"__file__": str(file), "__name__": file.stem}
        exec(compile(file.read_text(), file, "exec"), names)
        found |= set(flattened(names["get_config"]()))
    return found


def flattened(config):
    for key, value in config.items():
        yield key
        if isinstance(value, ConfigDict):
            yield from (f"{key}.{below}" for below in flattened(value))


def blocks():
    """The code blocks of the pages, and the commands at the head of modules, with their place."""
    for page in PAGES:
        for block in re.findall(r"```[a-z]*\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                yield page.name, line
        for line in re.findall(r"`(python (?:-m |benchmarks)[^`]+)`", page.read_text()):
            yield page.name, line
    for module in MODULES:
        text = ast.get_docstring(ast.parse(module.read_text())) or ""
        for block in re.findall(r"(?:^    .*\n?)+", text, re.MULTILINE):
            if "python " in block:
                yield module.name, block


def command_lines():
    """(place, file of the command, its flags without values) of everything that blocks start."""
    for place, line in blocks():
        command, flags = None, []
        words = [word.strip("[]") for word in shlex.split(line, comments=True)]
        for before, word in itertools.pairwise(["", *words]):
            started = file_of(before, word) or ("conprediff_jax/main.py" if word == "--" else None)
            if started:
                yield place, command, flags
                command, flags = started, []
            elif word.startswith("--"):
                flags.append(word[2:].partition("=")[0])
        yield place, command, flags


def file_of(before, word):
    """The file of a command, if a word and the one before start one."""
    if before == "-m" and word.startswith("conprediff_jax."):
        return word.replace(".", "/") + ".py"
    return word if re.fullmatch(r"(benchmarks|launch)/\w+\.(py|sh)", word) else None


def test_documented_commands_exist_with_their_flags(helps):
    wrong, seen = [], set()
    for place, command, flags in command_lines():
        if command is None:
            continue
        if command not in helps:
            wrong.append(f"{place}: there is no {command}")
            continue
        seen.add(command)
        known = flags_of(helps[command])
        wrong += [f"{place}: {command} --{flag}" for flag in flags if not is_known(flag, known)]
    assert not wrong
    assert set(LAUNCHERS) < seen and {file for file in helps if "conprediff" in file} <= seen


# Documented commands, or flags of them, that no test gives to the command, and why.
NOT_RUN = {
    "benchmarks/context_cost.py": MEASURES,
    "benchmarks/diffusers_step.py": MEASURES,
    "benchmarks/plan_table.py": MEASURES,
    "benchmarks/step_overhead.py": MEASURES,
    "benchmarks/ablation.py --figure": "test_ablation calls what draws",
    "conprediff_jax/convert.py --average": "test_power_averages calls what reconstructs them",
    "conprediff_jax/evaluate_inpainting.py --lpips_trunk": NO_WEIGHTS,
    "conprediff_jax/evaluate_inpainting.py --lpips_heads": NO_WEIGHTS,
}


def test_documented_commands_are_run_by_a_test_or_say_why_not():
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").glob("*.py"))
    for exception in NOT_RUN:
        tests = tests.replace(exception, "")
    found = set()
    for _, command, flags in command_lines():
        if command is None or command in NOT_RUN:
            found.add(command)
            continue
        assert pathlib.Path(command).stem in tests, command
        for flag in flags:
            name = re.escape(flag.removeprefix("no"))
            given = rf"--(no)?{name}\b|[\"']{name}[\"']|\b{name}="
            if not flag.startswith("config.") and not re.search(given, tests):
                found.add(f"{command} --{flag}")
    assert found - {None} == set(NOT_RUN)


STARTED = [
    ["conprediff_jax/main.py", "--list"],
    ["conprediff_jax/main.py", "--config=configs/openmoji.py", "--print_config"],
    ["conprediff_jax/prepare.py", "--show=IMAGES", "--out=OUT"],
]


def test_commands_that_show_something_show_it(tmp_path):
    """Those that no other test starts."""
    places = {
        "--show=IMAGES": f"--show={tiny.write_images(tmp_path / 'images')}",
        "--out=OUT": f"--out={tmp_path / 'page'}",
    }
    commands = [[places.get(word, word) for word in command] for command in STARTED]
    configs, keys, shown = said_by(tmp_path, commands)
    for file in (ROOT / "configs").rglob("*.py"):
        assert str(file.relative_to(ROOT)) in configs
    assert "channel_mult = (1, 2)" in keys and "Chebyshev" in keys
    assert str(tmp_path / "page") in shown
    assert "24" in next((tmp_path / "page").glob("*.html")).read_text()


def test_help_offers_what_the_libraries_have():
    offered = {name: value for name, value in vars(choices).items() if name.isupper()}
    assert offered == {
        "SAMPLERS": tuple(samplers.SAMPLERS),
        "REVEALS": tuple(dict.fromkeys((*categorical.REVEALS, *masked.REVEALS))),
        "MASKS": masks.MASKS,
        "QUALITIES": tuple(inpainting.QUALITIES),
        "FITS": fitting.FITS,
        "POLARITIES": masks.POLARITIES,
        "LPIPS_NETWORKS": tuple(lpips.TRUNKS),
        "METRICS": suite.METRICS,
        "ENOUGH": suite.ENOUGH,
        "WRITTEN": formats.WRITTEN,
        "READ": formats.READ,
        "TOPOLOGIES": topology.EXAMPLES,
    }


def test_a_command_without_arguments_shows_three_lines(helps):
    for name in (name for name in helps if name.startswith("conprediff_jax/")):
        doc = ast.get_docstring(ast.parse((ROOT / name).read_text()))
        said = command_help.examples(doc)
        assert said.count("    python -m conprediff_jax.") == 3, name


def test_documented_flags_keys_and_files_exist(helps):
    known, wrong = set().union(*map(flags_of, helps.values())), []
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for code in re.findall(r"`([^`]+)`", prose):
            flags = re.findall(r"(?:^|\s)--([a-z][\w.-]*)", code)
            files = re.findall(r"^(?:benchmarks|launch|configs)/[\w/]+\.\w+$", code)
            wrong += [f"{page.name}: --{flag}" for flag in flags if not is_known(flag, known)]
            wrong += [f"{page.name}: {file}" for file in files if not (ROOT / file).exists()]
    assert not wrong


def test_the_page_of_configs_is_what_headers_and_docstrings_say():
    script = runpy.run_path(str(ROOT / "docs" / "configs.py"))
    page = (ROOT / "docs" / "configs.md").read_text()
    assert script["written"](page) == page, "run python docs/configs.py"


def test_every_key_has_a_meaning_that_names_its_choices():
    for cls in reference._all_classes():
        said = reference.meanings(cls)
        names = [field.name for field in config_keys.keys_of(cls)]
        assert not set(names) - set(said), f"the docstring of {cls.__name__} lacks them"
        for field in config_keys.keys_of(cls):
            if field.type is str and field.default:
                choices = choices_of(cls, field.name)
                assert all(choice in said[field.name] for choice in choices), (cls, field.name)


def choices_of(cls, name):
    """The choices of a field, as the message for a wrong one names them; none for free texts."""
    others = {"name": "a", "weights": "a", "num_steps": 2, "alpha_bar": abs, "share": abs}
    known = {field.name for field in dataclasses.fields(cls)}
    settings = {key: value for key, value in others.items() if key in known}
    try:
        cls(**(settings | {name: "nonsense"}))
    except (ValueError, TypeError) as error:
        return re.findall(r"\w+", "".join(re.split("one of|choose from", str(error))[1:]))
    return ()


def test_the_config_of_own_data_trains_on_its_classes(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "own_data.md").read_text()
    draw, own, notebook = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(draw.replace("range(300)", "range(8)"), "shapes.py", "exec"), {})
    names = {}
    exec(compile(own, "configs/shapes.py", "exec"), names)
    config = names["get_config"]()
    config.model.update(channels=32, channel_mult=(1,))
    config.train.update(steps=2, batch_size=8)
    config.sampling.update(num=8, steps=2)
    train(config, "runs/shapes")
    names = {}
    exec(compile(notebook, "notebook", "exec"), names)
    classes = names["model"].class_names
    assert classes == ("circles", "squares", "triangles")
    np.testing.assert_array_equal(names["circles"][::2], names["both"][::2])
    assert numbers_of("triangles, 0", classes, 3) == (2, 0)
    assert numbers_of(["squares", 0], classes, 3) == (1, 0)
    assert numbers_of("circles", classes, 3) == 0 and numbers_of("2", (), 3) == 2
    with pytest.raises(FieldError, match=r"label names 'circels': did you mean 'circles'\?"):
        numbers_of("circels", classes, 3)
    with pytest.raises(FieldError, match=r"label names '3': the classes have no names, but numb"):
        numbers_of("3", (), 3)


def test_chaos_compares_runs(tmp_path):
    """The smallest there is: two runs of two steps, and nobody killed."""
    images = tiny.write_images(tmp_path / "images")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "notes").touch()
    arguments = [
        f"--workdir={tmp_path / 'runs'}", f"--config={ROOT / 'tests' / 'tiny.py'}",
        f"--set=data.name={images}", "--config.train.steps=2", "--config.train.sample_every=0",
        "--kills=0", "--processes=1",
    ]  # fmt: skip
    result = subprocess.run(
        [sys.executable, "benchmarks/chaos.py", *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == "0 kills, 1 runs of 1 processes: the same end, bit for bit\n"
    assert (tmp_path / "runs" / "whole" / "checkpoints" / "2").is_dir()
    assert (tmp_path / "runs" / "notes").exists()
