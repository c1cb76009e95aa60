"""FFHQ 256, unconditional: LDM-4 with context prediction.

    python -m conprediff_jax.main --config=configs/ffhq.py

Data: the aligned FFHQ images, 256 x 256 or larger, as a folder of PNG files in data/ffhq (TFDS has
no FFHQ).
First stage: as for configs/celebahq.py. Published batch: 42; here 48, which more meshes divide.
Hardware: one host of eight GPUs or a TPU v5e-16; bf16 activations, float32 parameters.
Hours: not measured.
Expected: the paper reports FID 2.24 with context prediction and 4.98 for this backbone without
(arXiv 2401.02015, 50,000 samples). Not run to the end by us: no number of ours yet.
"""

from conprediff_jax import presets


def get_config():
    config = presets.ldm_4(weights="weights/vq-f4")
    config.data.update(name="./data/ffhq")
    return config
