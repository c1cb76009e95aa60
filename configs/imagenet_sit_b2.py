"""ImageNet 256, class-conditional: SiT-B/2 on latents, with context prediction.

    python -m conprediff_jax.precompute --config=configs/imagenet_sit_b2.py
    python -m conprediff_jax.main --config=configs/imagenet_sit_b2.py
    python -m conprediff_jax.sample --workdir=runs/imagenet_sit_b2 --label=207 --guidance=4

This is the size that losses for training are usually compared on.

Size: 256 x 256, 130.3 M parameters.
Needs:
    imagenet2012: the data. TFDS cannot fetch its archives; python -m conprediff_jax.prepare
        --name=imagenet2012 says which archives to put where, and then prepares them.
    weights/kl-f8: the first stage KL-f8, a diffusers AutoencoderKL. Give
        --config.first_stage.weights=hf://stabilityai/sd-vae-ft-mse to download the published one.
    latents/imagenet_256: the latents of all images and their mirror images, by
        python -m conprediff_jax.precompute --config=configs/imagenet_sit_b2.py
Hardware: one host of eight GPUs or a TPU v5e-16. Activations are bf16, parameters float32. The
130,303,504 parameters take 2.6 GB with optimiser, gradients and moving average.
Hours: not measured.
Expected: SiT reports an FID of 33.0 after 400,000 steps, without guidance, by 250 steps of the
stochastic sampler (arXiv 2401.08740). Batch, learning rate, moving average and label
dropout are as published. We have not run this config, so there is no number of ours yet.
"""

from conprediff_jax.config import presets


def get_config():
    config = presets.sit(weights="weights/kl-f8", size="B")
    config.data.update(name="imagenet2012", latents="latents/imagenet_256")
    return config
