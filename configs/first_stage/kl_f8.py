"""KL-f8, the autoencoder of LDM-8, to latents of 32 x 32 x 4.

    python -m conprediff_jax.main --config=configs/first_stage/kl_f8.py
        --config.loss.lpips_trunk=vgg16-397923af.pth --config.loss.lpips_heads=vgg.pth

The autoencoder has 83,653,863 parameters, and a discriminator of 2.8 M starts after 50,000 steps.
Losses and weights are those of latent-diffusion's config of this name. The two files are
torchvision's weights of VGG-16 and the heads of the `lpips` package (version 0.1). They do not come
with this project; without them the loss has no LPIPS, and reconstructions are blurred.

Size: 256 x 256, 83.7 M parameters.
Needs:
    celeb_a_hq/256: the data. TFDS cannot fetch its files; python -m conprediff_jax.prepare
        --name=celeb_a_hq/256 says which files to put where, and then prepares them.
        The original was trained on OpenImages; give another --config.data.name for a general
        codec.
Hardware: one host of eight GPUs or a TPU v5e-8. It is meant for GPUs of 40 GB.
Hours: not measured.
Expected: the published codec took 246,803 steps and has a PSNR of 24.2 on OpenImages. The tests
build this config and check its size; we have not run it.
"""

from conprediff_jax.config import default_first_stage


def get_config():
    config = default_first_stage("kl")
    config.dtype = "bfloat16"
    config.data.update(name="celeb_a_hq/256", image_size=256, flip=True)
    config.autoencoder.update(
        channels=128,
        channel_mult=(1, 2, 4, 4),
        blocks_per_level=2,
        latent_channels=4,
        remat=True,
    )
    config.loss.update(kl_weight=1e-6, gan_weight=0.5, gan_start=50_001)
    # 4.5e-6 for each image of a batch.
    config.optimizer.update(
        learning_rate=4.5e-6 * 96, warmup_steps=1000, b1=0.5, b2=0.9, weight_decay=0.0
    )
    config.train.update(steps=500_000, batch_size=96, sample_every=5000, checkpoint_every=5000)
    return config
