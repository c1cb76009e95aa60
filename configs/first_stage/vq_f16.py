"""VQGAN-f16, the image tokenizer of VQ-Diffusion, to 16 x 16 of 1,024 codes.

    python -m conprediff_jax.main --config=configs/first_stage/vq_f16.py
        --config.loss.lpips_trunk=vgg16-397923af.pth --config.loss.lpips_heads=vgg.pth

The autoencoder has 72,141,699 parameters and a discriminator of 2.8 M, with the sizes of
taming-transformers' codec of FFHQ. The two files are those of configs/first_stage/vq_f4.py.

Size: 256 x 256, 72.1 M parameters.
Needs:
    celeb_a_hq/256: the data. TFDS cannot fetch its files; python -m conprediff_jax.prepare
        --name=celeb_a_hq/256 says which files to put where, and then prepares them.
        For FFHQ, give `--config.data.name=./data/ffhq`.
Hardware: one host of eight GPUs or a TPU v5e-8. It is meant for GPUs of 40 GB.
Hours: not measured.
Expected: no number yet. The tests build this config and check its size; we have not run it.
"""

from conprediff_jax.config import default_first_stage


def get_config():
    config = default_first_stage("vq")
    config.dtype = "bfloat16"
    config.data.update(name="celeb_a_hq/256", image_size=256, flip=True)
    config.autoencoder.update(
        channels=128,
        channel_mult=(1, 1, 2, 2, 4),
        blocks_per_level=2,
        attention_downsampling=(16,),
        latent_channels=256,
        num_codes=1024,
        remat=True,
    )
    config.loss.update(gan_weight=0.8, gan_start=30_000)
    # 4.5e-6 for each image of a batch.
    config.optimizer.update(
        learning_rate=4.5e-6 * 64, warmup_steps=1000, b1=0.5, b2=0.9, weight_decay=0.0
    )
    config.train.update(steps=500_000, batch_size=64, sample_every=5000, checkpoint_every=5000)
    return config
