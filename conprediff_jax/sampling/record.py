"""What images were drawn by: all that they depend on as plain data, and in short as a name.

`settings_of` makes the record of a sampling out of the fields of its `SamplingSpec` and of what a
command was asked for. The record lies as `settings.json` in every folder of images, as the array
`settings` in every npz, and in every PNG of a grid. `claim` keeps images of two records apart.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import absolute, write_new
from conprediff_jax.common.fingerprint import fingerprint
from conprediff_jax.common.images import EXTENSIONS
from conprediff_jax.common.trees import flatten
from conprediff_jax.common.version import code_version
from conprediff_jax.sampling.autoguidance import guide_of
from conprediff_jax.sampling.model import TrainedModel
from conprediff_jax.sampling.spec import SamplingSpec

FILE = "settings.json"
Settings = dict[str, Any]

# Entries that say where images and figures come from, and do not decide what they are.
_FACTS = ("workdir", "guide", "version", "evaluated_by", "samples.name", "reference.name")
_LONGEST = 40  # letters of a text in a name


def parameters_of(params: Any, frozen: Any) -> str:
    """Fingerprint of all parameters; a step does not identify them, as a run may be repeated.

    Args:
        params: See `DiffusionModel`.
        frozen: See `DiffusionModel`.
    """
    leaves = jax.tree.leaves((params, frozen))
    return fingerprint(np.asarray(leaf).tobytes() for leaf in leaves)


def model_of(trained: TrainedModel, workdir: str | os.PathLike) -> Settings:
    """The part of a record that says which model it is, and which parameters it has."""
    return {
        "workdir": str(absolute(workdir)),
        "step": trained.step,
        "average": trained.average,
        "parameters": parameters_of(trained.params, trained.frozen),
        **guide_of(trained.model),
    }


def described(trained: TrainedModel, workdir: str | os.PathLike) -> str:
    """Which model it is, with its guide, in words for the log."""
    guide = "".join(f", guided by {name}" for name in guide_of(trained.model).values())
    return f"step {trained.step} of {os.fspath(workdir)}{guide}"


def settings_of(model: Settings, spec: SamplingSpec, *, seed: int, **asked: Any) -> Settings:
    """All that images depend on, as plain data for JSON.

    Args:
        model: The model with its parameters, as `model_of` describes it.
        spec: The settings of sampling; every field but `num` is taken up.
        seed: The seed of the images.
        **asked: What else the images depend on, such as a label or captions; None is left out.
    """
    kind = type(spec).__name__.removesuffix("Sampling").lower()  # for a spec of one sampler
    sampling = {"sampler": kind} | dataclasses.asdict(spec)
    del sampling["num"]
    record = {
        **model,
        "sampling": sampling,
        "seed": seed,
        **{key: value for key, value in asked.items() if value is not None},
        "version": code_version(),
    }
    return json.loads(json.dumps(record))


def content_of(arrays: Iterable[np.ndarray]) -> str:
    """Fingerprint of arrays, such as the images and masks that fillings depend on."""
    return fingerprint(array.tobytes() for array in arrays)


def short_name(settings: Settings, usual: SamplingSpec, *keys: str) -> str:
    """A name for a file or folder that says what was asked for.

    It has the step, the sampler, the steps of sampling, a guidance that is not 1, every other field
    of sampling that is not as usual, the seed, the guide of a guided model, and the entries of
    `keys` that the settings have.

    Args:
        settings: The record of `settings_of`.
        usual: The model's own settings of sampling.
        *keys: Further entries of the record.
    """
    sampling = dict(settings["sampling"])
    parts = [f"step_{settings['step']:07}", f"{sampling.pop('sampler')}_{sampling.pop('steps')}"]
    expected = json.loads(json.dumps(dataclasses.asdict(usual))) | {"guidance": 1.0}
    parts += [
        _part(key, value) for key, value in sampling.items() if expected.get(key, value) != value
    ]
    parts.append(f"seed_{settings['seed']}")
    keys = ("guide", *keys)
    return "_".join(parts + [_part(key, settings[key]) for key in keys if key in settings])


def _part(key: str, value: Any) -> str:
    """An entry in a name: numbers with their key, a text without it, texts by their number."""
    if isinstance(value, str):
        return slug(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        if len(value) == 1:
            return slug(value[0])
        return f"{len(value)}_{key}_{fingerprint([json.dumps(value).encode()])[:6]}"
    numbers = value if isinstance(value, list) else [value]
    return "_".join([key, *(f"{x:g}" if isinstance(x, float) else str(x) for x in numbers)])


def slug(text: str) -> str:
    """A text as part of a file's name; a fingerprint follows it where the name does not say all."""
    if len(text) <= _LONGEST and re.fullmatch(r"[A-Za-z0-9,-]+([ .][A-Za-z0-9,-]+)*", text):
        return text.replace(" ", "_")
    kept = re.sub(r"[^A-Za-z0-9,.-]+", "_", text)[:_LONGEST].strip("_.-")
    return f"{kept}_{fingerprint([text.encode()])[:6]}".lstrip("_")


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """In what two records differ, such as 'seed 0, not 1'; '' if images of both are the same."""
    one, other = _decisive(found), _decisive(wanted)
    for key in one | other:
        if one.get(key) != other.get(key):
            return f"{key} {_shown(one.get(key))}, not {_shown(other.get(key))}"
    return ""


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a record that decide what images or figures are, flat."""
    return {key: value for key, value in flatten(dict(settings)).items() if key not in _FACTS}


def fingerprint_of(settings: Mapping[str, Any]) -> str:
    """A short name for a record, which is the same for records of the same images or figures."""
    return fingerprint([json.dumps(_decisive(settings), sort_keys=True).encode()])[:6]


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."


def claim(
    folder: str | os.PathLike, settings: Settings, *, ending: str = ".png", overwrite: bool = False
) -> Settings:
    """Takes a folder for the images of one record, so that no others come among them.

    Args:
        folder: The folder. If it holds images of these settings, they stay; the caller goes on.
        settings: The record.
        ending: The ending of the files that the images are written to.
        overwrite: Whether to remove what the folder holds, if `settings.json` says what it is.

    Returns:
        The record in the folder, which is older than `settings` where the folder holds images. The
        version in it is that of the code which drew the first of them.

    Raises:
        UserError: The folder holds images of other settings, or images of unknown origin.
    """
    folder, settings = epath.Path(folder), json.loads(json.dumps(settings))
    note = folder / FILE
    if overwrite and note.exists():
        for file in [*images_in(folder, ending), note]:
            file.unlink()
    # Images are looked for first: another command may write its note and images at this moment.
    images = folder.is_dir() and any(map(_is_image, _files(folder)))
    if images and not note.exists():
        raise UserError(f"{folder}: holds images, and no {FILE} says which: name another folder")
    text = json.dumps(settings, indent=2) + "\n"
    if write_new(note, lambda file: file.write(text.encode())):
        return settings
    found = read(folder)
    if differs := difference(found, settings):
        raise UserError(
            f"{folder}: holds images of {differs}: name another folder, or overwrite this one"
        )
    return found


def images_in(folder: str | os.PathLike, ending: str = ".png") -> list[epath.Path]:
    """The images of a folder and its subfolders, which `claim` removes to overwrite them."""
    folder = epath.Path(folder)
    return [file for file in _files(folder) if file.suffix == ending] if folder.is_dir() else []


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    """The files of a folder and its subfolders, without those that links to folders lead to."""
    for entry in folder.iterdir():
        if not entry.is_dir():
            yield entry
        elif not os.path.islink(entry):
            yield from _files(entry)


def _is_image(file: epath.Path) -> bool:
    return file.suffix.lower() in (*EXTENSIONS, ".npz")


def of_images(path: str | os.PathLike) -> Settings:
    """The record that lies with images of a folder or an npz; {} where there is none."""
    path = epath.Path(path)
    if path.is_dir():
        return read(path) if (path / FILE).exists() else {}
    try:
        with np.load(path) as arrays:
            return dict(**json.loads(arrays["settings"].item()))
    except (KeyError, ValueError, TypeError):  # an npz of another program
        return {}


def read(folder: str | os.PathLike) -> Settings:
    """The record in a folder of images.

    Raises:
        UserError: There is no record, or it cannot be read.
    """
    note = epath.Path(folder) / FILE
    try:
        return dict(**json.loads(note.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{note}: does not say what images lie beside it: name another folder, or remove this "
            "one"
        ) from error
