"""The TFDS data set `openmoji`. It is a package so that TFDS finds the builder's metadata."""
