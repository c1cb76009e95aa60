"""CIFAR-10 in pixels, unconditional: the UNet and schedule of DDPM.

    python -m conprediff_jax.main --config=configs/cifar10.py

Size: 32 x 32, 35.7 M parameters.
Needs: nothing. The data, TFDS `cifar10`, are downloaded on first use (170 MB).
Hardware: one GPU or TPU chip. Activations are bf16.
Hours: not measured. The whole run has 800,000 steps of 128 images, as published.
Expected: the FID of DDPM (Ho et al. 2020) is 3.17, with the same network of 35.7 M parameters. We
have not run this config with context prediction to the end, so there is no number to expect yet.
"""

from conprediff_jax.config import default


def get_config():
    config = default()
    config.dtype = "bfloat16"
    config.data.update(name="cifar10", image_size=32, flip=True, label=None, download=True)
    config.process.update(schedule="linear", num_steps=1000, beta_start=1e-4, beta_end=0.02)
    config.model.update(
        channels=128,
        channel_mult=(1, 2, 2, 2),
        blocks_per_level=2,
        attention_downsampling=(2,),
        num_heads=1,
        head_channels=None,
        dropout=0.1,
    )
    config.context.update(weight=0.03, points_per_example=128, warmup_steps=20_000)
    config.optimizer.update(learning_rate=2e-4, warmup_steps=5000, weight_decay=0.0)
    config.train.update(steps=800_000, batch_size=128, ema_decay=0.9999)
    config.sampling.update(sampler="ddim", steps=100)
    return config
