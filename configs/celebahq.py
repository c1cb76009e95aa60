"""CelebA-HQ 256, unconditional: LDM-4 with context prediction.

    python -m conprediff_jax.main --config=configs/celebahq.py

Size: 256 x 256, 274.1 M parameters.
Needs:
    celeb_a_hq/256: the data. TFDS cannot fetch its files; python -m conprediff_jax.prepare
        --name=celeb_a_hq/256 says which files to put where, and then prepares them.
    weights/vq-f4: the first stage VQ-f4, a diffusers VQModel. The flag
        --config.first_stage.weights=hf://CompVis/ldm-celebahq-256/vqvae?bin downloads the published
        one. Or train it: python -m conprediff_jax.main --config=configs/first_stage/vq_f4.py
        --workdir=weights/vq-f4
Hardware: one host of eight GPUs or a TPU v5e-16. By its plan a chip of v5e-16 needs 2.8 GB with the
default mesh (docs/plans.md). Activations are bf16, parameters float32.
Hours: not measured.
Expected: the paper reports FID 3.22 with context prediction, and 5.11 for this backbone without it
(arXiv 2401.02015, 50,000 samples). We have not run this config to the end, so there is no number of
ours yet.
"""

from conprediff_jax.config import presets


def get_config():
    config = presets.ldm_4(weights="weights/vq-f4")
    config.data.update(name="celeb_a_hq/256")
    return config
