"""The header of a model card: what the Hugging Face Hub lists and searches, as YAML."""

import os
import pathlib
import re
from collections.abc import Sequence

from ml_collections import ConfigDict

from conprediff_jax.common import hub

LIBRARY = "conprediff_jax"

# A data set of TFDS: cifar10, celeb_a_hq/256.
_TFDS = re.compile(r"([a-z]\w*)(?:/[\w.-]+)?(?::.*)?")


def write_card(
    folder: pathlib.Path,
    text: str,
    config: ConfigDict,
    *,
    library: str,
    trained: bool,
    origin: str,
    license: str | None,
    metrics: Sequence[str] = (),
    task: str | None = None,
) -> None:
    """Writes a card with its header, `README.md`.

    Args:
        folder: The folder.
        text: The card without a header.
        config: The whole config of the model.
        library: The library that opens the folder.
        trained: Whether the model was trained here, on the data of the config.
        origin: The place that the weights come from.
        license: The identifier of the license, such as 'apache-2.0'; None for no entry.
        metrics: Names of the metrics that the card quotes.
        task: The Hub's name of what the model is for.
    """
    from huggingface_hub import ModelCard, ModelCardData  # takes a second

    tags = ["diffusion", "jax", LIBRARY]
    if trained and config.get("context", {}).get("weight"):
        tags += ["conprediff", "arxiv:2401.02015"]
    data = ModelCardData(
        library_name=library,
        tags=tags,
        license=license,
        datasets=_datasets(config.data.name) if trained else None,
        metrics=[re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") for name in metrics] or None,
        pipeline_tag=task,
        base_model=hub.parse(origin).repo if hub.is_hub(origin) else None,
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")


def _datasets(name: str) -> list[str] | None:
    """The data set, unless it is a folder on this machine."""
    known = _TFDS.fullmatch(name)
    return [known[1]] if known and not os.path.exists(name) else None
