"""ImageNet 256, class-conditional: SiT-XL/2 on latents, with context prediction.

    python -m conprediff_jax.precompute --config=configs/imagenet_sit_xl2.py
    python -m conprediff_jax.main --config=configs/imagenet_sit_xl2.py
    python -m conprediff_jax.sample --workdir=runs/imagenet_sit_xl2 --label=207 --guidance=4

Size: 256 x 256, 674.8 M parameters.
Needs:
    imagenet2012: the data. TFDS cannot fetch its archives; python -m conprediff_jax.prepare
        --name=imagenet2012 says which archives to put where, and then prepares them.
    weights/kl-f8: the first stage KL-f8, a diffusers AutoencoderKL. Give
        --config.first_stage.weights=hf://stabilityai/sd-vae-ft-mse to download the published one.
    latents/imagenet_256: the latents of all images and their mirror images, by
        python -m conprediff_jax.precompute --config=configs/imagenet_sit_xl2.py
Hardware: a TPU v5e-16 or two hosts of eight GPUs. By its plan a chip of v5e-16 needs 10.6 GB with
the default mesh, and 5.5 GB with --config.mesh.fsdp=4, at the same speed (docs/plans.md).
Activations are bf16, parameters float32.
Hours: not measured.
Expected: SiT reports an FID of 17.2 after 400,000 steps and of 8.3 after 7,000,000, without
guidance, and of 2.06 with guidance (arXiv 2401.08740). All three are of 250 steps of the stochastic
sampler; those of the flow alone are worse. Batch, learning rate, moving average and label dropout
are as published. We have not run this config, so there is no number of ours yet.

To start from the published weights, import them (`python -m conprediff_jax.convert import`), and
name the imported folder in --config.train.init_from.
"""

from conprediff_jax.config import presets


def get_config():
    config = presets.sit(weights="weights/kl-f8")
    config.data.update(name="imagenet2012", latents="latents/imagenet_256")
    return config
