"""Autoencoder of OpenMoji people and faces, to latents of 8 x 8 x 32.

    python -m conprediff_jax.main --config=configs/first_stage/openmoji_kl.py

Size: 64 x 64, 2.6 M parameters.
Needs: nothing.
Hardware: 2 CPU cores. The run takes 2 GB of memory.
Hours: 0.1 (4,500 steps at 14 to 27 a second).
Expected: PSNR 29.1 on the images it was trained on, and L1 0.036. In the grid, outlines and colours
are clean; rare colours (a red face) are off.

The first layer turns patches of 8 x 8 pixels into channels, so that all convolutions work on a
cheap grid of 8 x 8. Small batches and a high learning rate make the most of the time (a learning
rate of 2e-3 gives PSNR 27.8). The weight of the KL term keeps a little noise in the latents, and
the decoder learns to cope with it.
"""

from conprediff_jax.config import default_first_stage


def get_config():
    config = default_first_stage("kl")
    config.data.update(name="openmoji/people", image_size=64)
    config.autoencoder.update(
        channels=128,
        channel_mult=(1,),
        blocks_per_level=1,
        patch=8,
        middle_attention=False,
        latent_channels=32,
    )
    config.loss.kl_weight = 1e-3
    config.optimizer.update(
        learning_rate=6e-3, schedule="cosine", warmup_steps=50, b2=0.99, weight_decay=0.0
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
