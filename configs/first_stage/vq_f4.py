"""VQ-f4, the autoencoder of LDM-4, to latents of 64 x 64 x 3.

    python -m conprediff_jax.main --config=configs/first_stage/vq_f4.py
        --config.loss.lpips_trunk=vgg16-397923af.pth --config.loss.lpips_heads=vgg.pth

The autoencoder has 55,322,782 parameters and a discriminator of 2.8 M. Losses and weights are those
of latent-diffusion's config of this name. The two files are torchvision's weights of VGG-16 and the
heads of the `lpips` package (version 0.1). They do not come with this project; without them the
loss has no LPIPS, and reconstructions are blurred.

Size: 256 x 256, 55.3 M parameters.
Needs:
    celeb_a_hq/256: the data. TFDS cannot fetch its files; python -m conprediff_jax.prepare
        --name=celeb_a_hq/256 says which files to put where, and then prepares them.
        The original was trained on OpenImages; give another --config.data.name for a general
        codec.
Hardware: one host of eight GPUs or a TPU v5e-8. It is meant for GPUs of 40 GB.
Hours: not measured.
Expected: the published codec took 658,131 steps and has a PSNR of 25.2 on OpenImages. The tests
build this config and check its size; we have not run it.
"""

from conprediff_jax.config import default_first_stage


def get_config():
    config = default_first_stage("vq")
    config.dtype = "bfloat16"
    config.data.update(name="celeb_a_hq/256", image_size=256, flip=True)
    config.autoencoder.update(
        channels=128,
        channel_mult=(1, 2, 4),
        blocks_per_level=2,
        latent_channels=3,
        num_codes=8192,
        remat=True,
    )
    config.loss.update(gan_weight=0.75, gan_start=0)
    # 4.5e-6 for each image of a batch.
    config.optimizer.update(
        learning_rate=4.5e-6 * 64, warmup_steps=1000, b1=0.5, b2=0.9, weight_decay=0.0
    )
    config.train.update(steps=500_000, batch_size=64, sample_every=5000, checkpoint_every=5000)
    return config
