"""Pipelines that stand beside exports as `pipeline.py`, since diffusers shelves its own.

diffusers has moved LDMPipeline, VQDiffusionPipeline and RePaintPipeline to its deprecated ones.
These files need only diffusers' models and schedulers, and nothing here imports them. They open as

    DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)

diffusers gives all files of this name one module, and allows one pipeline in it. So their classes
have one name, and exports of several kinds open in one process.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

FILE = "pipeline.py"

# The file for exports of a pipeline's class. Models of pixels have a pipeline that fills holes.
_FILES = {
    "LDMPipeline": "latent.py",
    "VQDiffusionPipeline": "tokens.py",
    "DDIMPipeline": "fill.py",
    "DDPMPipeline": "fill.py",
}


def write(pipeline: str, scheduler: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Writes the custom pipeline for an export, if there is one for it.

    Args:
        pipeline: The class of the exported pipeline.
        scheduler: The config of its scheduler. Holes are filled by models that predict noise.
        folder: The folder of the export.
    """
    name = _FILES.get(pipeline)
    if name and (name != "fill.py" or scheduler.get("prediction_type") == "epsilon"):
        text = (pathlib.Path(__file__).parent / name).read_text(encoding="utf-8")
        (folder / FILE).write_text(text, encoding="utf-8")
