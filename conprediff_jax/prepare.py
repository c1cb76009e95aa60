"""Downloads a TFDS data set, and writes it in a format with random access.

    python -m conprediff_jax.prepare --name=openmoji/people
    python -m conprediff_jax.prepare --name=cifar10 --data_dir=data
    python -m conprediff_jax.prepare --name=celeb_a_hq/256 --manual_dir=downloads

A data set that is already there is left as it is. TFDS shows its progress while it works.
"""

from absl import flags

from conprediff_jax.cli import help

_NAME = flags.DEFINE_string(
    "name", None, "Prepare the TFDS data set of this name, such as openmoji/people.", required=True
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "Write the data set to this folder; the default is TFDS_DATA_DIR or ~/tensorflow_datasets.",
)
_MANUAL_DIR = flags.DEFINE_string(
    "manual_dir",
    None,
    "Find files that you must download yourself in this folder; the default is "
    "DATA_DIR/downloads/manual.",
)

help.answer(__name__)  # before imports that take seconds

from conprediff_jax.cli import app
from conprediff_jax.common import opening
from conprediff_jax.data.tfds import default_data_dir, prepare


def main(argv: list[str]) -> None:
    """Prepares the data set and says where it was written."""
    del argv
    where = _DATA_DIR.value or default_data_dir()
    opening.say(f"the files of {_NAME.value}", "a data set with random access", where, on=None)
    builder = prepare(_NAME.value, _DATA_DIR.value, _MANUAL_DIR.value)
    splits = ", ".join(
        f"{info.num_examples:,} {split}" for split, info in builder.info.splits.items()
    )
    print(f"{_NAME.value}: {splits}; in {builder.data_dir}")


if __name__ == "__main__":
    app.run(main)
