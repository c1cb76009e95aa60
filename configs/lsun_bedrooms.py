"""LSUN Bedrooms 256, unconditional: LDM-4 with context prediction.

    python -m conprediff_jax.main --config=configs/lsun_bedrooms.py

Data: TFDS `lsun/bedroom`. Prepare it once: python -m conprediff_jax.prepare --name=lsun/bedroom
First stage: the same as for configs/celebahq.py.
Hardware: one host of eight GPUs, or a TPU v5e-16. Activations are bf16, parameters float32.
Hours: not measured.
Expected: the paper reports FID 1.12 (second-hand) with context prediction, and 2.95 for this
backbone without it (arXiv 2401.02015, 50,000 samples). We have not run this config to the end, so
there is no number of ours yet.
"""

from conprediff_jax.config import presets


def get_config():
    config = presets.ldm_4(weights="weights/vq-f4")
    config.data.update(name="lsun/bedroom")
    return config
