"""CIFAR-10 in pixels, unconditional: EDM with context prediction.

    python -m conprediff_jax.main --config=configs/cifar10_edm.py
    python -m conprediff_jax.sample --workdir=runs/cifar10_edm --num=64

Size: 32 x 32, 53.6 M parameters.
Needs: nothing. The data, TFDS `cifar10`, are downloaded on first use (170 MB).
Hardware: one host of eight GPUs or a TPU v5e-8. Activations are bf16; those of the published runs
are float32.
Hours: not measured. The whole run has 390,625 steps of 512 images, 200 M images as published.
Expected: EDM (Karras et al. 2022) reports an FID of 1.97 with 35 calls of its network DDPM++, which
has 55.7 M parameters. Levels of noise, loss, learning rate, warm-up, batch and moving average are
as published. Widths and the number of blocks are those of DDPM++ too, but the blocks are ADM's
(53.6 M parameters), and of the published augmentation there are only mirror images. We have not run
this config, so there is no number of ours yet.

Stochastic sampling with the published settings for this data set:
--config.sampling.churn=30 --config.sampling.churn_min=0.01 --config.sampling.churn_max=1
--config.sampling.churn_noise=1.007
"""

from conprediff_jax.config import default, section
from conprediff_jax.diffusion import EDMProcess
from conprediff_jax.sampling.spec import EDMSampling


def get_config():
    config = default().unlock()
    config.dtype = "bfloat16"
    config.data.update(name="cifar10", image_size=32, flip=True, label=None, download=True)
    config.process = section(EDMProcess, kind="edm")
    config.sampling = section(EDMSampling, steps=18)
    config.model.update(
        channels=128,
        channel_mult=(2, 2, 2),
        blocks_per_level=4,
        attention_downsampling=(2,),
        num_heads=1,
        head_channels=None,
        dropout=0.13,
    )
    config.context.update(weight=0.03, points_per_example=128, warmup_steps=20_000)
    config.optimizer.update(
        learning_rate=1e-3, warmup_steps=19_531, weight_decay=0.0, clip_norm=0.0
    )
    # The published average halves an image's share every 500,000 images.
    config.train.update(steps=390_625, batch_size=512, ema_decay=0.5 ** (512 / 500_000))
    return config.lock()
