"""FFHQ 256, unconditional, discrete: VQ-Diffusion with context prediction over 16 x 16 tokens.

    python -m conprediff_jax.main --config=configs/ffhq_discrete.py

Data: the aligned FFHQ images, 256 x 256 or larger, as a folder of PNG files in data/ffhq (TFDS has
no FFHQ).
First stage: VQGAN-f16 with 1,024 codes in weights/vqgan-f16-ffhq. This is a diffusers VQModel
(config.json and diffusion_pytorch_model.safetensors), or the workdir of
configs/first_stage/vq_f16.py.
Hardware: one host of eight GPUs, or a TPU v5e-16. Activations are bf16, parameters float32.
Hours: not measured.
Expected: VQ-Diffusion reports FID 6.33 without context prediction (arXiv 2111.14822). The paper
reports no discrete model on FFHQ. We have not run this config to the end, so there is no number of
ours yet.
"""

from conprediff_jax.config import presets


def get_config():
    config = presets.vq_diffusion_f16(weights="weights/vqgan-f16-ffhq")
    config.data.name = "./data/ffhq"
    return config.lock()
