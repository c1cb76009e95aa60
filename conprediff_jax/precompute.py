"""Encodes a data set once, ahead of training, through a config's frozen first stage.

    python -m conprediff_jax.precompute --config=configs/celebahq.py --out=latents/celebahq
    python -m conprediff_jax.main --config=configs/celebahq.py
        --config.data.latents=latents/celebahq

Where `config.data.flip` is set, mirrored images are encoded too; where `config.data.encoded_text`
is, so are the captions, by the frozen text encoder. A scale that the config does not
give is measured as training would measure it. Started again with the same --out, the command goes
on after the last whole shard; another config or other weights are refused there. Several processes,
started as those of training are (see `main`), take shards in turn.
"""

from absl import flags

from conprediff_jax.cli import app, config_flag
from conprediff_jax.common.errors import UserError
from conprediff_jax.parallel import processes
from conprediff_jax.train.precompute import precompute

_CONFIG = config_flag.define()
_OUT = flags.DEFINE_string("out", None, "Folder of the latents; config.data.latents when absent.")
_SHARD_SIZE = flags.DEFINE_integer(
    "shard_size", None, "Images a file; 1024 when absent, or as many as make 256 files.",
    lower_bound=1,
)  # fmt: skip
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    """Reads the flags and encodes."""
    del argv
    out = _OUT.value or _CONFIG.value.data.get("latents")
    if not out:
        raise UserError("--out is missing: a folder for the latents")
    processes.exit_when_asked()
    precompute(_CONFIG.value, out, _SHARD_SIZE.value)


if __name__ == "__main__":
    app.run(main, several=True)
