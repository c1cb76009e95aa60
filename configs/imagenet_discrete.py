"""ImageNet 256, class-conditional, discrete: VQ-Diffusion with context prediction.

    python -m conprediff_jax.main --config=configs/imagenet_discrete.py
    python -m conprediff_jax.sample --workdir=runs/imagenet_discrete --label=207 --guidance=3

Data: the same as for configs/imagenet.py.
First stage: VQGAN-f16 with 16,384 codes in weights/vqgan-f16-imagenet. This is a diffusers VQModel,
or the workdir of configs/first_stage/vq_f16.py trained on this data with
--config.autoencoder.num_codes=16384. The data use few of the codes, so only the 974 most used ones
are kept, as published.
Hardware: one host of eight GPUs, or a TPU v5e-16. Activations are bf16, parameters float32.
Hours: not measured.
Expected: VQ-Diffusion reports FID 11.89 without guidance (arXiv 2111.14822). The published model
was not trained for guidance; here one label in ten is dropped, which guidance needs. We have not
run this config to the end, so there is no number of ours yet.
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
