"""TPU slices by name, and descriptions of their devices, for which programs can be compiled."""

import contextlib
import dataclasses
import math
import os
import re
import sys
from collections.abc import Iterator

import jax

from conprediff_jax.common.errors import FieldError, UserError
from conprediff_jax.xla.chips import CHIPS, Chip

# Shapes of the slices that Cloud names by a number, here by chips; for v4 and v5p, Cloud's number
# is that of TensorCores.
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

# Without these variables, libtpu queries Cloud's metadata server, and only one process can load it.
_ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """A slice of a TPU pod.

    Attributes:
        generation: A key of `chips.CHIPS`.
        shape: Number of chips along every dimension of the torus.
    """

    generation: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> "Topology":
        """Reads a slice from `v5e:4x4`, or from Cloud's name for it, `v5e-16`.

        Raises:
            FieldError: There is no such slice.
        """
        match = re.fullmatch(r"(\w+)[:-](\d+(?:x\d+)*)", name.strip())
        generation = match[1] if match else ""
        if generation not in CHIPS:
            raise FieldError(
                "topology",
                f"is {name!r}: it must name a TPU slice of {', '.join(CHIPS)}, such as {EXAMPLES}",
            )
        chip, shape = CHIPS[generation], tuple(map(int, match[2].split("x")))
        if "-" in name:
            slices = _SQUARES if chip.dimensions == 2 else _CUBES
            if len(shape) != 1 or shape[0] % chip.cores or shape[0] // chip.cores not in slices:
                sizes = ", ".join(f"{generation}-{size * chip.cores}" for size in slices)
                raise FieldError("topology", f"is {name!r}: there is no such slice; choose {sizes}")
            shape = slices[shape[0] // chip.cores]
        if len(shape) != chip.dimensions or min(shape) < 1:
            example = "4x4" if chip.dimensions == 2 else "4x4x4"
            raise FieldError(
                "topology",
                f"is {name!r}: a slice of {generation} has {chip.dimensions} dimensions, as in "
                f"{generation}:{example}",
            )
        return cls(generation=generation, shape=shape)

    def __str__(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip:
        """The specification of its chips."""
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    def devices(self) -> list[jax.Device]:
        """Descriptions of the devices, one for each chip, for which programs can be compiled.

        Raises:
            UserError: libtpu is not installed.
            FieldError: libtpu knows no such slice.
        """
        from jax.experimental import topologies

        for key, value in _ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        # On Cloud, the two cores of a v4 chip work as one device; libtpu needs an option for that.
        options = {"chip_config_name": "megacore"} if self.generation == "v4" else {}
        try:
            with _quiet():
                described = topologies.get_topology_desc(
                    platform="tpu", topology_name=str(self), **options
                )
        except (RuntimeError, ImportError) as error:
            if "libtpu" in str(error).lower() and "INVALID" not in str(error):
                raise UserError(
                    "compiling for TPUs needs the library libtpu, but no TPU: "
                    'pip install -e ".[plan]"'
                ) from error
            reason = str(error).splitlines()[0]
            raise FieldError(
                "topology", f"is {str(self)!r}, which libtpu does not know: {reason}"
            ) from error
        assert len(described.devices) == self.chips, "not one device a chip"
        return described.devices


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the messages of libtpu's C++ code about missing TPU hosts."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
