"""The first run: OpenMoji people and faces, in pixels.

    python -m conprediff_jax.main --config=configs/openmoji.py

Size: 32 x 32, 5.9 M parameters.
Needs: nothing.
Hardware: 2 CPU cores. The run takes 3 GB of memory.
Hours: 0.15 (3,000 steps, 6.7 a second on one core alone).
Expected: a final loss of about 0.048 (denoise 0.0285, context 0.019 after weighting). The grid
shows faces, busts and figures with closed outlines; nine in ten of them are clean.

A point is a patch of 4 x 4 pixels, so that the UNet works on a cheap grid of 8 x 8. The UNet
predicts x_0: a network that sees patches cannot pass their noise through, which predicting epsilon
or v would require. The context weight is the one that brought the local structure of samples nearer
to that of real drawings, on seeds that were not used to find it; a third of this weight changes
nothing (docs/results.md).
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
    config.context.update(weight=0.09, points_per_example=16, warmup_steps=500)
    config.optimizer.update(learning_rate=1.5e-3, schedule="cosine", warmup_steps=50, b2=0.99)
    config.train.update(
        steps=3000,
        batch_size=16,
        ema_decay=0.995,
        log_every=50,
        sample_every=750,
        checkpoint_every=750,
    )
    return config
