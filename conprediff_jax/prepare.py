"""Downloads and writes a TFDS data set, ready for random access.

    python -m conprediff_jax.prepare --name=openmoji/people [--data_dir=...] [--manual_dir=...]

What is there already is left as it is. TFDS shows its progress while it works.
"""

from absl import flags

from conprediff_jax.cli import app
from conprediff_jax.data.tfds import prepare

_NAME = flags.DEFINE_string("name", None, "TFDS name, such as openmoji/people.", required=True)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where to; TFDS_DATA_DIR or ~/tensorflow_datasets when absent."
)
_MANUAL_DIR = flags.DEFINE_string(
    "manual_dir", None, "Where files lie that must be fetched by hand; DATA_DIR/downloads/manual."
)


def main(argv: list[str]) -> None:
    """Prepares the data set and says where it was written."""
    del argv
    builder = prepare(_NAME.value, _DATA_DIR.value, _MANUAL_DIR.value)
    splits = ", ".join(
        f"{info.num_examples:,} {split}" for split, info in builder.info.splits.items()
    )
    print(f"{_NAME.value}: {splits}; in {builder.data_dir}")


if __name__ == "__main__":
    app.run(main)
