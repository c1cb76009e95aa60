"""The first run: OpenMoji people and faces, 32 x 32, on a laptop's CPU.

    python -m conprediff_jax.main --config=configs/openmoji.py

Hardware: 2 CPU cores, 2 GB.
"""

from conprediff_jax.config import default


def get_config():
    config = default()
    config.data.update(name="openmoji/people", image_size=32)
    config.first_stage.patch = 4
    config.process.update(
        schedule="cosine", prediction="x0", weighting="min_snr", snr_max=5.0, snr_min=0.5
    )
    config.model.update(channels=96, channel_mult=(1, 2), blocks_per_level=1, head_channels=32)
    config.context.update(weight=0.03, points_per_example=16, warmup_steps=500)
    config.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_steps=50)
    config.train.update(
        steps=1200,
        batch_size=32,
        ema_decay=0.99,
        log_every=50,
        sample_every=400,
        checkpoint_every=400,
    )
    return config
