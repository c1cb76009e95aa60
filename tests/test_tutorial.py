"""The notebook of the docs, run cell by cell with a few steps in the place of many."""

import json
import pathlib
import subprocess
import sys

from quick import environment

ROOT = pathlib.Path(__file__).parent.parent


def test_the_tutorial_runs_and_was_stored_with_its_pictures(tmp_path):
    cells = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert str(cells).count("image/png") == 4
    (tmp_path / "tutorial.py").write_text("\n\n".join(code))
    variables = {
        "TUTORIAL_STEPS": "2",
        "MPLBACKEND": "Agg",
    }
    done = subprocess.run(
        [sys.executable, tmp_path / "tutorial.py"],
        cwd=tmp_path, env=environment(**variables), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step 2: loss" in done.stdout
