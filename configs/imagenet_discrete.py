"""ImageNet 256, class-conditional, discrete: VQ-Diffusion with context prediction.

    python -m conprediff_jax.main --config=configs/imagenet_discrete.py
    python -m conprediff_jax.sample --workdir=runs/imagenet_discrete --label=207 --guidance=3

Size: 256 x 256, 518.0 M parameters.
Needs:
    imagenet2012: the data. TFDS cannot fetch its archives; python -m conprediff_jax.prepare
        --name=imagenet2012 says which archives to put where, and then prepares them.
    weights/vqgan-f16-imagenet: the first stage VQGAN-f16 with 16,384 codes, a diffusers VQModel
        (config.json and diffusion_pytorch_model.safetensors) or a workdir of ours: python -m
        conprediff_jax.main --config=configs/first_stage/vq_f16.py --config.data.name=imagenet2012
        --config.autoencoder.num_codes=16384 --workdir=weights/vqgan-f16-imagenet
Hardware: one host of eight GPUs or a TPU v5e-16. Activations are bf16, parameters float32.
Hours: not measured.
Expected: VQ-Diffusion reports FID 11.89 without guidance (arXiv 2111.14822). The published model
was not trained for guidance; here one label in ten is dropped, which guidance needs. We have not
run this config to the end, so there is no number of ours yet.

The data use few of the codes, so only the 974 most used ones are kept, as published.
"""

from conprediff_jax.config import presets


def get_config():
    config = presets.vq_diffusion_f16(
        weights="weights/vqgan-f16-imagenet", num_codes=16_384, used_codes=974
    )
    config.data.update(name="imagenet2012", label="label")
    config.model.update(num_layers=24, num_classes=1000)
    config.condition.dropout = 0.1
    return config.lock()
