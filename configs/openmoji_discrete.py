"""Discrete diffusion: OpenMoji people and faces, as 8 x 8 tokens.

Train the image tokenizer first, then this config:

    python -m conprediff_jax.main --config=configs/first_stage/openmoji_vq.py
    python -m conprediff_jax.main --config=configs/openmoji_discrete.py

Size: 64 x 64, 3.6 M parameters.
Needs:
    runs/openmoji_vq: the image tokenizer, by python -m conprediff_jax.main
        --config=configs/first_stage/openmoji_vq.py
Hardware: 2 CPU cores. The run takes 3 GB of memory.
Hours: 0.2 (3,200 steps at 4.7 a second, two grids), after 0.1 for the image tokenizer.
Expected: a final loss of about 3.1 nats a token (denoise 2.9, context 0.19 after weighting), and
4.8 bits a token on the test split (21.7 before training). The grid shows busts, faces, figures and
vehicles; most of them are clean, a few are smeared. Sampling by purity, one token a call, makes
this possible: after so few steps, only half of a grid drawn from the posterior can be recognised.
"""

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
    # A loop of blocks compiles faster, but its steps take 8 to 10 % longer on CPUs.
    config.model.update(width=192, num_layers=6, num_heads=6, unroll=True)
    config.context.update(weight=0.3, points_per_example=16, warmup_steps=500)
    config.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_steps=100)
    config.train.update(
        steps=3200,
        batch_size=16,
        ema_decay=0.995,
        log_every=100,
        sample_every=1600,
        checkpoint_every=1600,
    )
    config.sampling.update(reveal="purity", tokens_per_call=1, purity_weight=2.0)
    return config.lock()
