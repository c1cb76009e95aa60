"""FFHQ 256, unconditional: LDM-4 with context prediction.

    python -m conprediff_jax.main --config=configs/ffhq.py

Size: 256 x 256, 274.1 M parameters.
Needs:
    ./data/ffhq: the data, the aligned FFHQ images, 256 x 256 or larger, as a folder of PNG files;
        https://github.com/NVlabs/ffhq-dataset says how to download them (TFDS has no FFHQ).
    weights/vq-f4: the first stage VQ-f4, a diffusers VQModel. The flag
        --config.first_stage.weights=hf://CompVis/ldm-celebahq-256/vqvae?bin downloads the published
        one. Or train it: python -m conprediff_jax.main --config=configs/first_stage/vq_f4.py
        --workdir=weights/vq-f4
Hardware: one host of eight GPUs or a TPU v5e-16. Activations are bf16, parameters float32. The
published batch is 42; here it is 48, which more meshes divide.
Hours: not measured.
Expected: the paper reports FID 2.24 with context prediction, and 4.98 for this backbone without it
(arXiv 2401.02015, 50,000 samples). We have not run this config to the end, so there is no number of
ours yet.
"""

from conprediff_jax.config import presets


def get_config():
    config = presets.ldm_4(weights="weights/vq-f4")
    config.data.update(name="./data/ffhq")
    return config
