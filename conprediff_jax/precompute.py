"""Encodes a data set once, ahead of training, with the fixed first stage of a config.

    python -m conprediff_jax.precompute --config=configs/celebahq.py --out=latents/celebahq
    python -m conprediff_jax.precompute --config=configs/celebahq.py --out=latents/celebahq
        --config.data.flip=False
    python -m conprediff_jax.main --config=configs/celebahq.py
        --config.data.latents=latents/celebahq

If `config.data.flip` is set, the command encodes mirrored images, too. If
`config.data.encoded_text` is set, it encodes the captions, too, with the fixed text encoder. If the
config gives no scale of the latents, the command measures the scale as training would. If you start
it again with the same --out, it continues after the last whole shard; it refuses another config or
other weights. Several processes, started like those of training (see `main`), take shards in turn.
"""

from absl import flags

from conprediff_jax.cli import config_flag, headers, help

_CONFIG = config_flag.define()
_OUT = flags.DEFINE_string(
    "out", None, "Write the latents to this folder; the default is config.data.latents."
)
_SHARD_SIZE = flags.DEFINE_integer(
    "shard_size",
    None,
    "Write this many images to a file; the default is 1024, or more where this would make more "
    "than 256 files.",
    lower_bound=1,
)
flags.mark_flag_as_required("config")

help.answer(__name__, several=True)  # before imports that take seconds

from conprediff_jax.cli import app
from conprediff_jax.common.errors import UserError
from conprediff_jax.parallel import processes
from conprediff_jax.train import needs
from conprediff_jax.train.precompute import precompute


def main(argv: list[str]) -> None:
    """Reads the flags and encodes the data set."""
    del argv
    out = _OUT.value or _CONFIG.value.data.get("latents")
    if not out:
        raise UserError("--out is missing: give a folder for the latents")
    processes.exit_when_asked()
    needs.check(_CONFIG.value, None, headers.read(app.config_name()).needs, encode=True)
    precompute(_CONFIG.value, out, _SHARD_SIZE.value)


if __name__ == "__main__":
    app.run(main, several=True, again="the same command continues after the last whole file")
