"""How long it takes to open a run and to draw its first and later images; and its size on disk.

    python benchmarks/load.py --workdir=model --num=16

One process imports `conprediff_jax`, then calls `load`, then `sample` twice; the first `sample`
compiles. There is no compilation cache unless JAX's own settings name one.
"""

import pathlib
import time

import jax
from absl import flags, logging

from conprediff_jax.cli import app

_WORKDIR = flags.DEFINE_string("workdir", None, "A workdir or an inference folder.", required=True)
_NUM = flags.DEFINE_integer("num", 16, "Images of each call of sample.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Prints the size and the three times."""
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
