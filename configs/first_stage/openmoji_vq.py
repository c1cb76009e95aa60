"""A first stage that a laptop trains: OpenMoji people and faces, 64 x 64 to 8 x 8 codes.

    python -m conprediff_jax.main --config=configs/first_stage/openmoji_vq.py

Hardware: 2 CPU cores, 2 GB of memory.
"""

from conprediff_jax.config import default_first_stage


def get_config():
    config = default_first_stage("vq")
    config.data.update(name="openmoji/people", image_size=64)
    config.autoencoder.update(
        channels=128,
        channel_mult=(1,),
        blocks_per_level=1,
        patch=8,
        middle_attention=False,
        latent_channels=16,
        num_codes=1024,
    )
    config.loss.codebook_decay = 0.99
    config.optimizer.update(
        learning_rate=2e-3, schedule="cosine", warmup_steps=50, b2=0.99, weight_decay=0.0
    )
    config.train.update(
        steps=4500,
        batch_size=8,
        ema_decay=0.995,
        log_every=100,
        sample_every=1500,
        checkpoint_every=1500,
    )
    return config
