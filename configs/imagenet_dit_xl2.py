"""ImageNet 256, class-conditional: DiT-XL/2 on latents, with context prediction.

    python -m conprediff_jax.precompute --config=configs/imagenet_dit_xl2.py
    python -m conprediff_jax.main --config=configs/imagenet_dit_xl2.py
    python -m conprediff_jax.sample --workdir=runs/imagenet_dit_xl2 --label=207 --guidance=4

Data: the same as for configs/imagenet.py. The first command encodes all images and their mirror
images, so that training never encodes any.
First stage: Stable Diffusion's KL-f8 in weights/kl-f8. This is a diffusers AutoencoderKL
(config.json and diffusion_pytorch_model.safetensors).
Hardware: TPU v5e-64 (--config.mesh.fsdp=8) or four hosts of eight GPUs. Activations are bf16,
parameters float32. The 674,816,272 parameters take 13.5 GB with optimiser, gradients and moving
average, which fsdp divides over devices.
Hours: not measured.
Expected: DiT reports an FID of 19.5 after 400,000 steps and of 9.62 after 7,000,000, without
guidance, and of 2.27 with guidance (arXiv 2212.09748). Batch, learning rate, moving average and
label dropout are as published; the published network also learns the variance of its steps. We have
not run this config, so there is no number of ours yet.

To start from the published weights, import them (`python -m conprediff_jax.convert import`), and
name the imported folder in --config.train.init_from.
"""

from conprediff_jax.config import presets


def get_config():
    config = presets.dit(weights="weights/kl-f8")
    config.data.update(name="imagenet2012", latents="latents/imagenet_256")
    return config
