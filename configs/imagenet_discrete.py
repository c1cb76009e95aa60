"""ImageNet 256, class-conditional, discrete: VQ-Diffusion with context prediction.

    python -m conprediff_jax.main --config=configs/imagenet_discrete.py
    python -m conprediff_jax.sample --workdir=runs/imagenet_discrete --label=207 --guidance=3

Data: as for configs/imagenet.py.
First stage: VQGAN-f16 of 16,384 codes in weights/vqgan-f16-imagenet: a diffusers VQModel, or the
workdir of configs/first_stage/vq_f16.py trained on this data with
--config.autoencoder.num_codes=16384. The data takes few of the codes: the 974 most used are kept,
as published.
Hardware: one host of eight GPUs or a TPU v5e-16; bf16 activations, float32 parameters.
Hours: not measured.
Expected: VQ-Diffusion reports FID 11.89 without guidance (arXiv 2111.14822), which the
published model was not trained for; here one label in ten is dropped. Not run to the end by us: no
number of ours yet.
"""

from conprediff_jax import presets


def get_config():
    config = presets.vq_diffusion_f16(
        weights="weights/vqgan-f16-imagenet", num_codes=16_384, used_codes=974
    )
    config.data.update(name="imagenet2012", label="label")
    config.model.update(num_layers=24, num_classes=1000)
    config.condition.dropout = 0.1
    return config.lock()
