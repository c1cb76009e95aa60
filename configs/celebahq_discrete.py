"""CelebA-HQ 256, unconditional, discrete: the model of configs/ffhq_discrete.py.

    python -m conprediff_jax.main --config=configs/celebahq_discrete.py

Data: the same as for configs/celebahq.py.
First stage: VQGAN-f16 with 1,024 codes in weights/vqgan-f16-celebahq. This is a diffusers VQModel,
or the workdir of configs/first_stage/vq_f16.py trained on this data.
Hardware: one host of eight GPUs, or a TPU v5e-16. Activations are bf16, parameters float32.
Hours: not measured.
Expected: nobody has published a number for this model. We have not run this config to the end, so
there is no number of ours yet.
"""

from conprediff_jax.config import presets


def get_config():
    config = presets.vq_diffusion_f16(weights="weights/vqgan-f16-celebahq")
    config.data.name = "celeb_a_hq/256"
    return config.lock()
