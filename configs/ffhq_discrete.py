"""FFHQ 256, unconditional, discrete: VQ-Diffusion with context prediction.

    python -m conprediff_jax.main --config=configs/ffhq_discrete.py

Size: 256 x 256, 411.2 M parameters.
Needs:
    ./data/ffhq: the data, the aligned FFHQ images, 256 x 256 or larger, as a folder of PNG files;
        https://github.com/NVlabs/ffhq-dataset says how to download them (TFDS has no FFHQ).
    weights/vqgan-f16-ffhq: the first stage VQGAN-f16 with 1,024 codes, a diffusers VQModel
        (config.json and diffusion_pytorch_model.safetensors) or a workdir of ours: python -m
        conprediff_jax.main --config=configs/first_stage/vq_f16.py --config.data.name=./data/ffhq
        --workdir=weights/vqgan-f16-ffhq
Hardware: one host of eight GPUs or a TPU v5e-16. By its plan a chip of v5e-16 needs 6.0 GB with the
default mesh, which no other mesh outruns (docs/plans.md). Activations are bf16, parameters float32.
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
