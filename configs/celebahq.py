"""CelebA-HQ in pixels, 256 x 256, unconditional: the UNet of google/ddpm-celebahq-256.

    python -m conprediff_jax.main --config=configs/celebahq.py

Data: TFDS `celeb_a_hq/256`; its files are fetched by hand, and the command says which and where to.
Hardware: meant for a TPU v5e-16 or eight GPUs of 40 GB; parameters are replicated (114 M),
activations bf16, blocks recomputed in the backward pass. Hours: not measured. The config is built
and its shapes are checked by the tests; it has not been run to the end by us, so there is no number
to expect yet.
"""

from conprediff_jax.config import default


def get_config():
    config = default()
    config.dtype = "bfloat16"
    config.data.update(name="celeb_a_hq/256", image_size=256, flip=True)
    config.process.update(schedule="linear", num_steps=1000, beta_start=1e-4, beta_end=0.02)
    config.model.update(
        channels=128,
        channel_mult=(1, 1, 2, 2, 4, 4),
        blocks_per_level=2,
        attention_downsampling=(16,),
        num_heads=1,
        head_channels=None,
        remat=True,
    )
    config.context.update(weight=0.03, points_per_example=256, warmup_steps=20_000)
    config.optimizer.update(learning_rate=2e-5, warmup_steps=5000, weight_decay=0.0)
    config.train.update(steps=500_000, batch_size=64, ema_decay=0.9999)
    config.sampling.update(sampler="ddim", steps=100, num=16)
    return config
