"""Data without end: dead leaves, opaque discs of all sizes, in pixels.

    python -m conprediff_jax.prepare --name=dead_leaves/32
    python -m conprediff_jax.main --config=configs/dead_leaves.py

It is `openmoji.py` on images that are computed, of which the run sees none twice. What neighbouring
pixels do in them is known exactly; `benchmarks/known_structure.py` compares samples with it.

Size: 32 x 32, 5.9 M parameters.
Needs:
    dead_leaves/32: 65,536 images, by python -m conprediff_jax.prepare --name=dead_leaves/32
Hardware: 2 CPU cores. The run takes 3 GB of memory.
Hours: not measured. `openmoji.py`, with the same network and number of steps, takes 0.15.
Expected: not measured.
"""

from conprediff_jax.config import default


def get_config():
    config = default()
    config.data.update(name="dead_leaves/32", image_size=32)
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
