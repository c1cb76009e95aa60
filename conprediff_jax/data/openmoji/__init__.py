"""The TFDS data set `openmoji`; a builder finds its metadata only inside a package."""
