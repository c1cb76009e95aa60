"""A model that diffusers opens: OpenMoji people and faces, in pixels without patches.

    python -m conprediff_jax.main --config=configs/openmoji_unet.py

Size: 16 x 16, 1.7 M parameters.
Needs: nothing.
Hardware: 2 CPU cores.
Hours: 0.25 (2,000 steps, 2.9 a second on one core alone, and a minute to compile).
Expected: a final loss of about 0.029 (denoise 0.022, context 0.0075 after weighting). The grid
shows busts and figures that can be recognised; their backgrounds are not quite white.
"""

from conprediff_jax.config import default


def get_config():
    config = default()
    config.data.update(name="openmoji/people", image_size=16)
    config.process.update(schedule="cosine", prediction="v", weighting="min_snr", snr_max=5.0)
    config.model.update(channels=32, channel_mult=(1, 2, 3), blocks_per_level=1, head_channels=32)
    config.context.update(weight=0.09, points_per_example=16, warmup_steps=500)
    config.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_steps=50, b2=0.99)
    config.train.update(
        steps=2000,
        batch_size=16,
        ema_decay=0.995,
        log_every=100,
        sample_every=2000,
        checkpoint_every=2000,
    )
    config.sampling.num = 36
    return config
