"""Discrete diffusion on a laptop's CPU: OpenMoji people and faces, 64 x 64, as 8 x 8 tokens."""

from conprediff_jax.config import default_discrete, tokens


def get_config():
    first_stage = tokens(
        "runs/openmoji_vq",
        channels=128,
        channel_mult=(1,),
        blocks_per_level=1,
        patch=8,
        middle_attention=False,
        latent_channels=16,
        num_codes=1024,
    )
    config = default_discrete(first_stage).unlock()
    config.data.update(name="openmoji/people", image_size=64)
    config.model.update(width=192, num_layers=6, num_heads=6)
    config.context.update(weight=0.03, points_per_example=16, warmup_steps=500)
    config.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_steps=100)
    config.train.update(
        steps=2600,
        batch_size=32,
        ema_decay=0.995,
        log_every=50,
        sample_every=400,
        checkpoint_every=400,
    )
    return config.lock()
