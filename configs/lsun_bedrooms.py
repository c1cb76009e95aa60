"""LSUN Bedrooms 256, unconditional: LDM-4 with context prediction.

    python -m conprediff_jax.main --config=configs/lsun_bedrooms.py

Data: TFDS `lsun/bedroom` (prepare it once: python -m conprediff_jax.data.prepare
--name=lsun/bedroom). First stage: as for configs/celebahq.py. Hardware: one host of eight GPUs or a
TPU v5e-16; bf16 activations, float32 parameters. Hours: not measured. Expected: the paper reports
FID 1.12 (second-hand) with context prediction and 2.95 for this backbone without (arXiv 2401.02015,
50,000 samples). Not run to the end by us: no number of ours yet.
"""

from conprediff_jax import presets


def get_config():
    config = presets.ldm_4(weights="weights/vq-f4")
    config.data.update(name="lsun/bedroom")
    return config
