"""TPU slices by name, and device descriptions of slices that are not there."""

import contextlib
import dataclasses
import math
import os
import re
import sys
from collections.abc import Iterator

import jax

from conprediff_jax.common.errors import UserError
from conprediff_jax.xla.chips import CHIPS, Chip

# Shapes of the slices that Cloud names by a number, by chips; of v4 and v5p it counts TensorCores.
_SQUARES = {4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_CUBES = {
    4: (2, 2, 1),
    8: (2, 2, 2),
    16: (2, 2, 4),
    32: (2, 4, 4),
    64: (4, 4, 4),
    128: (4, 4, 8),
    256: (4, 8, 8),
    512: (8, 8, 8),
}
EXAMPLES = "v5e:4x4, v5p:2x4x4, or Cloud's v5e-16, v4-128 (64 chips), v5p-64 (32 chips)"

# Without these libtpu asks the network who it is, and lets no second process load it.
_ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """A slice of a TPU pod.

    Attributes:
        generation: a key of `chips.CHIPS`.
        shape: chips along every dimension of its torus.
    """

    generation: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> "Topology":
        """From `v5e:4x4`, or from Cloud's `v5e-16`.

        Raises:
            UserError: there is no such slice.
        """
        match = re.fullmatch(r"(\w+)[:-](\d+(?:x\d+)*)", name.strip())
        generation = match[1] if match else ""
        if generation not in CHIPS:
            raise UserError(
                f"--topology={name}: plans are made for TPU slices only, of {', '.join(CHIPS)}: "
                f"such as {EXAMPLES}"
            )
        chip, shape = CHIPS[generation], tuple(map(int, match[2].split("x")))
        if "-" in name:
            slices = _SQUARES if chip.dimensions == 2 else _CUBES
            if len(shape) != 1 or shape[0] % chip.cores or shape[0] // chip.cores not in slices:
                sizes = ", ".join(f"{generation}-{size * chip.cores}" for size in slices)
                raise UserError(f"--topology={name}: there is no such slice, there are {sizes}")
            shape = slices[shape[0] // chip.cores]
        if len(shape) != chip.dimensions or min(shape) < 1:
            example = "4x4" if chip.dimensions == 2 else "4x4x4"
            raise UserError(
                f"--topology={name}: a slice of {generation} has {chip.dimensions} dimensions, as "
                f"in {generation}:{example}"
            )
        return cls(generation=generation, shape=shape)

    def __str__(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip:
        """What one chip can do."""
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    def devices(self) -> list[jax.Device]:
        """Descriptions of the devices, one a chip, which programs can be compiled for.

        Raises:
            UserError: libtpu is not installed, or knows no such slice.
        """
        from jax.experimental import topologies

        for key, value in _ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        # The two cores of a v4 chip work as one device, as Cloud has it; libtpu has to be told.
        options = {"chip_config_name": "megacore"} if self.generation == "v4" else {}
        try:
            with _quiet():
                described = topologies.get_topology_desc(
                    platform="tpu", topology_name=str(self), **options
                )
        except (RuntimeError, ImportError) as error:
            if "libtpu" in str(error).lower() and "INVALID" not in str(error):
                raise UserError(
                    f"--topology={self}: compiling for TPUs needs libtpu, which runs anywhere: "
                    'pip install -e ".[plan]"'
                ) from error
            reason = str(error).splitlines()[0]
            raise UserError(f"--topology={self}: libtpu does not know it: {reason}") from error
        assert len(described.devices) == self.chips, "not one device a chip"
        return described.devices


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what libtpu's C++ has to say about missing TPU hosts off the terminal."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
