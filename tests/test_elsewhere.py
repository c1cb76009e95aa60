"""Tests of the context term in a library that is not ours, as the documentation shows it."""

import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent


def test_the_example_for_hackable_diffusion_learns():
    pytest.importorskip("hackable_diffusion", reason="it needs Python 3.12")
    page = (ROOT / "docs" / "elsewhere.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(compile(example, "elsewhere.md", "exec"), names)
    first = {
        "network": names["variables"]["params"],
        "context": names["term"].init(jax.random.key(2), features=32, channels=3),
    }
    before, after = (
        float(names["losses"](params, names["x_0"], jax.random.key(9)))
        for params in (first, names["params"])
    )
    assert after < 0.9 * before
