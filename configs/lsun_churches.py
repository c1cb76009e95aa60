"""LSUN Churches 256, unconditional: LDM-8 with context prediction.

    python -m conprediff_jax.main --config=configs/lsun_churches.py

Data: TFDS `lsun/church_outdoor`. Prepare it once: python -m conprediff_jax.prepare
--name=lsun/church_outdoor
First stage: put a diffusers AutoencoderKL of KL-f8 (config.json and
diffusion_pytorch_model.safetensors) into weights/kl-f8, or train configs/first_stage/kl_f8.py.
Hardware: one host of eight GPUs, or a TPU v5e-16. Activations are bf16, parameters float32.
Hours: not measured.
Expected: the paper reports FID 1.78 (second-hand) with context prediction, and 4.02 for this
backbone without it (arXiv 2401.02015, 50,000 samples). We have not run this config to the end, so
there is no number of ours yet.
"""

from conprediff_jax.config import presets


def get_config():
    config = presets.ldm_8(weights="weights/kl-f8")
    config.data.update(name="lsun/church_outdoor")
    return config
