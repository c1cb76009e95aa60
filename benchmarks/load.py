"""How long it takes from a folder to images: size on disk, loading, first and later images.

    python benchmarks/load.py --workdir=model --num=16

In this order and in one process: `import conprediff_jax`, `load`, the first `sample`, which
compiles, and a second one. No compilation cache is used unless JAX is told to.
"""

import pathlib
import time

import jax
from absl import flags, logging

from conprediff_jax.cli import app

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir, or an inference folder.", required=True)
_NUM = flags.DEFINE_integer("num", 16, "Images.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Prints a line for each."""
    del argv
    import conprediff_jax

    files = [path for path in pathlib.Path(_WORKDIR.value).rglob("*") if path.is_file()]
    print(f"on disk   {sum(path.stat().st_size for path in files) / 1e6:10.2f} MB")
    began = time.perf_counter()
    model = conprediff_jax.load(_WORKDIR.value)
    jax.block_until_ready((model.params, model.frozen))
    print(f"load      {time.perf_counter() - began:10.2f} s")
    for name in ("first", "second"):
        began = time.perf_counter()
        model.sample(_NUM.value)
        print(f"{name:<9} {time.perf_counter() - began:10.2f} s, {_NUM.value} images")
    logging.info("%r on %s", model, jax.devices()[0].device_kind)


if __name__ == "__main__":
    app.run(main)
