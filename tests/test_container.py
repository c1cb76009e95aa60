"""Tests of the container file: its rules, its steps with programs that play pip, its entry point.

No image is built: that needs a daemon and downloads gigabytes.
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from quick import ROOT, environment

BIN = str(pathlib.Path(sys.executable).parent)
TEXT = re.sub(r"\\\n", "", (ROOT / "launch" / "Dockerfile").read_text())


def steps(name):
    """The arguments of all instructions of a kind."""
    return [line.removeprefix(f"{name} ") for line in TEXT.splitlines() if line.startswith(name)]


def test_the_file_keeps_the_rules_of_hadolint():
    if not (hadolint := shutil.which("hadolint", path=BIN)):
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, ROOT / "launch" / "Dockerfile"], capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"")


def test_what_is_copied_is_there_and_is_sent_to_the_builder():
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    for step in steps("COPY"):
        for source in step.split()[1:-1]:
            assert (ROOT / source).exists() and f"!{source}" in sent


@pytest.mark.parametrize(
    ("platform", "asked"), [("cpu", None), ("cuda", "jax[cuda13]"), ("tpu", "jax[tpu]")]
)
def test_the_platform_brings_its_plug_in_for_the_installed_jax(platform, asked, tmp_path):
    code, calls, _ = install(platform, tmp_path)
    expected = ["install --no-cache-dir --requirement requirements.txt", "freeze"]
    expected += [f"install --no-cache-dir {asked}==9.8.7"] if asked else []
    assert (code, calls) == (0, expected)


def test_an_unknown_platform_is_refused_in_one_line(tmp_path):
    code, _, said = install("gpu", tmp_path)
    assert (code, said) == (2, "PLATFORM is gpu: it must be cpu, cuda or tpu\n")


def install(platform, folder):
    """Runs the step that installs; returns its exit code, the calls of pip, and its errors."""
    (step,) = (step for step in steps("RUN") if "requirements.txt" in step)
    calls = folder / "calls"
    calls.touch()
    pip = f'echo "$*" >> {calls}\nif [ "$1" = freeze ]; then echo jax==9.8.7; fi'
    for name, text in {"pip": pip, "python": "true"}.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", "-o", "pipefail", "-c", step], cwd=folder, capture_output=True, text=True,
        env={"PATH": f"{folder}:/usr/bin:/bin", "PLATFORM": platform},
    )  # fmt: skip
    return done.returncode, calls.read_text().splitlines(), done.stderr


def test_the_entry_point_runs_a_command_with_its_flags():
    (entry,) = map(json.loads, steps("ENTRYPOINT"))
    done = subprocess.run(
        [*entry, "sample", "--version"], cwd=ROOT, capture_output=True, text=True,
        env=environment(PATH=f"{BIN}:/usr/bin:/bin"),
    )  # fmt: skip
    assert done.returncode == 0 and "conprediff_jax" in done.stdout, done
