"""KL"""

from conprediff_jax.config import default_first_stage


def get_config():
    config = default_first_stage("kl")
    config.data.update(name="openmoji/people", image_size=64)
    config.autoencoder.update(
        channels=64,
        channel_mult=(1, 2),
        blocks_per_level=1,
        patch=4,
        latent_channels=8,
    )
    config.loss.update(kl_weight=1e-5)
    config.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_steps=50)
    config.train.update(
        steps=1000,
        batch_size=32,
        ema_decay=0.99,
        log_every=50,
        sample_every=400,
        checkpoint_every=400,
    )
    return config
