"""Data without end: grids of a Potts model at its transition, as 16 x 16 tokens.

    python -m conprediff_jax.prepare --name=potts/16
    python -m conprediff_jax.main --config=configs/potts.py

The tokens are those of the data, one a pixel, so there is no image tokenizer to train. The run sees
no grid twice. `benchmarks/known_structure.py` compares samples with what is known of the grids.

Size: 16 x 16, 0.6 M parameters.
Needs:
    potts/16: 65,536 grids, by python -m conprediff_jax.prepare --name=potts/16
Hardware: 2 CPU cores. The run takes 2 GB of memory.
Hours: not measured.
Expected: not measured.
"""

from conprediff_jax.config import default_discrete, palette


def get_config():
    config = default_discrete(palette(3)).unlock()
    config.data.update(name="potts/16", image_size=16)
    # A loop of blocks compiles faster, but its steps take 8 % longer on CPUs.
    config.model.update(width=96, num_layers=4, num_heads=4, unroll=True)
    # The weight is the one that was confirmed on grids of 8 x 8 (docs/results/potts.md).
    config.context.update(weight=0.9, points_per_example=16, warmup_steps=300)
    config.optimizer.update(learning_rate=2e-3, schedule="cosine", warmup_steps=100)
    config.sampling.truncation = 1.0  # all of the distribution, since the law is what is compared
    config.train.update(
        steps=2000,
        batch_size=16,
        ema_decay=0.995,
        log_every=100,
        sample_every=1000,
        checkpoint_every=1000,
    )
    return config.lock()
