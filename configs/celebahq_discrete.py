"""CelebA-HQ 256, unconditional, discrete: as configs/ffhq_discrete.py.

    python -m conprediff_jax.main --config=configs/celebahq_discrete.py

Data: as for configs/celebahq.py.
First stage: VQGAN-f16 of 1,024 codes in weights/vqgan-f16-celebahq: a diffusers VQModel, or the
workdir of configs/first_stage/vq_f16.py trained on this data.
Hardware: one host of eight GPUs or a TPU v5e-16; bf16 activations, float32 parameters.
Hours: not measured.
Expected: no published number for this model. Not run to the end by us: no number of ours yet.
"""

from conprediff_jax import presets


def get_config():
    config = presets.vq_diffusion_f16(weights="weights/vqgan-f16-celebahq")
    config.data.name = "celeb_a_hq/256"
    return config.lock()
