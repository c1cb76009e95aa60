"""Latent diffusion: OpenMoji people and faces, on latents of 8 x 8 x 32.

Train the autoencoder first, encode all latents, then train this config:

    python -m conprediff_jax.main --config=configs/first_stage/openmoji_kl.py
    python -m conprediff_jax.precompute --config=configs/openmoji_latent.py
    python -m conprediff_jax.main --config=configs/openmoji_latent.py

Size: 64 x 64, 5.9 M parameters.
Needs:
    runs/openmoji_kl: the autoencoder, by python -m conprediff_jax.main
        --config=configs/first_stage/openmoji_kl.py
    runs/openmoji_latents: the latents, by python -m conprediff_jax.precompute
        --config=configs/openmoji_latent.py
Hardware: 2 CPU cores. The run takes 3 GB of memory.
Hours: 0.2 (5,000 steps at 7 to 11 a second), after 0.1 for the autoencoder and seconds for latents.
Expected: a final loss of about 0.098 (denoise 0.073, context 0.025 after weighting). The grid shows
busts, figures and scenes with clean outlines at 64 x 64; one in six is smudged (docs/latents.md).

With `--config.data.latents=` every step encodes its images instead, at two thirds of the speed. In
the same time, batches of 16 got further than batches of 32.
"""

from conprediff_jax.config import default, latents


def get_config():
    config = default().unlock()
    config.data.update(name="openmoji/people", image_size=64, latents="runs/openmoji_latents")
    config.first_stage = latents(
        "kl",
        weights="runs/openmoji_kl",
        channels=128,
        channel_mult=(1,),
        blocks_per_level=1,
        patch=8,
        middle_attention=False,
        latent_channels=32,
    )
    config.process.update(
        schedule="cosine", prediction="x0", weighting="min_snr", snr_max=5.0, snr_min=0.5
    )
    config.model.update(channels=96, channel_mult=(1, 2), blocks_per_level=1, head_channels=32)
    config.context.update(weight=0.03, points_per_example=16, warmup_steps=500)
    config.optimizer.update(learning_rate=1.5e-3, schedule="cosine", warmup_steps=50, b2=0.99)
    config.train.update(
        steps=5000,
        batch_size=16,
        ema_decay=0.995,
        log_every=50,
        sample_every=1000,
        checkpoint_every=1000,
    )
    config.sampling.clip = 0.0
    return config.lock()
