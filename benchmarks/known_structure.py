"""Compares the local structure of samples with that of data whose answer is known.

    python -m conprediff_jax.sample --workdir=runs/potts --num=4096 --out=potts.npz
    python benchmarks/known_structure.py --law=potts/16 --samples=potts.npz

The data are those that `python -m conprediff_jax.prepare` computes: `dead_leaves` and `potts`.
The table has a column for what is known of the law, one for as many images drawn from the law as
the first file holds, which is what a perfect model would reach, and one for each file of samples.
Standard errors are over images. Distances (W2, total variation) are above 0 for any finite number
of images, so compare them with the column of the perfect model, at equal numbers of images.

Nothing is read from a prepared data set: images of the law are drawn anew, by random numbers that
no prepared data set uses. For Potts grids, `--reference` says how many stand for the law.
"""

import json
import pathlib

import numpy as np
from absl import flags, logging
from study import known_structure
from study.known_structure import Estimate

from conprediff_jax.cli import app
from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import check_file, write_text
from conprediff_jax.common.progress import ProgressLine
from conprediff_jax.data import made
from conprediff_jax.data.potts import Potts
from conprediff_jax.metrics import npz
from conprediff_jax.planning.tables import markdown

_LAW = flags.DEFINE_enum("law", None, sorted(made.LAWS), "The data.", required=True)
_SAMPLES = flags.DEFINE_list("samples", [], "Files of samples, npz as `sample --out` writes them.")
_PERFECT = flags.DEFINE_integer(
    "perfect", None, "Images of the column of a perfect model; by default as many as the first "
    "file holds, or 4,096.", lower_bound=2
)  # fmt: skip
_REFERENCE = flags.DEFINE_integer(
    "reference", 16_384, "Potts grids that stand for the law.", lower_bound=made.BLOCK
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the images that are drawn.", lower_bound=0)
_OUT = flags.DEFINE_string("out", None, "Also write the figures to this JSON file.")


def main(argv: list[str]) -> None:
    """Draws images of the law, measures all sets, and prints the table."""
    del argv
    if _OUT.value:
        check_file(_OUT.value, "--out")
    law = made.LAWS[_LAW.value]
    sets = {pathlib.Path(path).name: _read(path, law) for path in _SAMPLES.value}
    count = _PERFECT.value or len(next(iter(sets.values()), range(4096)))
    needed = _REFERENCE.value if isinstance(law, Potts) else 0
    progress = ProgressLine(count + needed, "images", about=_LAW.value)
    perfect = np.concatenate(list(_drawn(law, "perfect", count, progress)))
    blocks = list(_drawn(law, "reference", needed, progress))
    reference = known_structure.groups_of(np.concatenate(blocks)) if blocks else []
    table = known_structure.compared(law, {"perfect": perfect} | sets, reference)
    print(_markdown(table))
    sizes = ", ".join(
        f"{name}: {len(images)}" for name, images in {"perfect": perfect, **sets}.items()
    )
    print(f"\n{law.description}. Images: {f'law: {needed}, ' if needed else ''}{sizes}.")
    if _OUT.value:
        found = {
            name: {column: e._asdict() for column, e in row.items()} for name, row in table.items()
        }
        write_text(_OUT.value, json.dumps(found, indent=1) + "\n")
        logging.info("%s", _OUT.value)


def _read(path: str, law: made.Law) -> np.ndarray:
    """The images of a file.

    Raises:
        UserError: They have another size, or colours that are no tokens.
    """
    file = npz.read(path)
    if file.shape is None or file.shape[1:3] != (law.side, law.side):
        raise UserError(
            f"--samples={path}: holds images of shape {file.shape}; {_LAW.value} has "
            f"{law.side} x {law.side} pixels"
        )
    images = np.concatenate(list(file.batches(1024)))
    if isinstance(law, Potts):
        try:
            known_structure.tokens_of(images, law.states)
        except ValueError as error:
            raise UserError(f"--samples={path}: {error}") from error
    return images


def _drawn(law: made.Law, split: str, count: int, progress: ProgressLine):
    """Images of the law in blocks, by random numbers of their own."""
    for images in made.blocks(law, _SEED.value, split, count):
        yield images
        progress.add(len(images))


def _markdown(table: dict[str, dict[str, Estimate]]) -> str:
    columns = list(next(iter(table.values())))
    rows = [[name, *(_cell(row[column]) for column in columns)] for name, row in table.items()]
    return markdown(rows, ["figure", *columns])


def _cell(estimate: Estimate) -> str:
    value, error = estimate
    return f"{value:.5f}" if error == 0 else f"{value:.5f} ± {error:.5f}"


if __name__ == "__main__":
    app.run(main)
