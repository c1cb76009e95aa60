"""LSUN Churches 256, unconditional: LDM-8 with context prediction.

    python -m conprediff_jax.main --config=configs/lsun_churches.py

Size: 256 x 256, 295.0 M parameters.
Needs:
    lsun/church_outdoor: the data, by python -m conprediff_jax.prepare --name=lsun/church_outdoor
    weights/kl-f8: the first stage KL-f8, a diffusers AutoencoderKL. The flag
        --config.first_stage.weights=hf://stabilityai/sd-vae-ft-mse downloads the published one. Or
        train it: python -m conprediff_jax.main --config=configs/first_stage/kl_f8.py
        --workdir=weights/kl-f8
Hardware: one host of eight GPUs or a TPU v5e-16. Activations are bf16, parameters float32.
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
