"""CelebA-HQ 256, unconditional, discrete: VQ-Diffusion with context prediction.

    python -m conprediff_jax.main --config=configs/celebahq_discrete.py

Size: 256 x 256, 411.2 M parameters.
Needs:
    celeb_a_hq/256: the data. TFDS cannot fetch its files; python -m conprediff_jax.prepare
        --name=celeb_a_hq/256 says which files to put where, and then prepares them.
    weights/vqgan-f16-celebahq: the first stage VQGAN-f16 with 1,024 codes, a diffusers VQModel
        (config.json and diffusion_pytorch_model.safetensors) or a workdir of ours: python -m
        conprediff_jax.main --config=configs/first_stage/vq_f16.py
        --workdir=weights/vqgan-f16-celebahq
Hardware: one host of eight GPUs or a TPU v5e-16. Activations are bf16, parameters float32.
Hours: not measured.
Expected: nobody has published a number for this model. We have not run this config to the end, so
there is no number of ours yet.
"""

from conprediff_jax.config import presets


def get_config():
    config = presets.vq_diffusion_f16(weights="weights/vqgan-f16-celebahq")
    config.data.name = "celeb_a_hq/256"
    return config.lock()
