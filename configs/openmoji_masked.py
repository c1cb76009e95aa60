"""Masked diffusion: OpenMoji people and faces, as 8 x 8 tokens.

Train the image tokenizer first, then this config:

    python -m conprediff_jax.main --config=configs/first_stage/openmoji_vq.py
    python -m conprediff_jax.main --config=configs/openmoji_masked.py

It is `openmoji_discrete.py` with the process of MD4 and MDLM in the place of VQ-Diffusion's: the
same tokens, network, context term, optimiser and number of steps.

Size: 64 x 64, 3.7 M parameters.
Needs:
    runs/openmoji_vq: the image tokenizer, by python -m conprediff_jax.main
        --config=configs/first_stage/openmoji_vq.py
Hardware: 2 CPU cores. The run takes 3 GB of memory.
Hours: 0.2 (3,200 steps, 4.2 a second on two cores alone), after 0.1 for the image tokenizer.
Expected: a final loss of about 3.3 nats a token (denoise 3.1, context 0.19 after weighting), and
5.0 bits a token on the test split. The grid shows faces, busts and figures; about two in three are
clean (docs/tokens.md).
"""

from conprediff_jax.config import default_masked, tokens


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
    config = default_masked(first_stage).unlock()
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
    config.sampling.update(steps=64, spacing="linear", reveal="confidence", truncation=0.86)
    return config.lock()
