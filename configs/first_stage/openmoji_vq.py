"""Image tokenizer of OpenMoji people and faces, to 8 x 8 codes.

    python -m conprediff_jax.main --config=configs/first_stage/openmoji_vq.py

Size: 64 x 64, 2.6 M parameters.
Needs: nothing.
Hardware: 2 CPU cores. The run takes 2 GB of memory.
Hours: 0.1 (4,500 steps at 10 to 14 a second).
Expected: PSNR 24.7 on the images it was trained on, and L1 0.055. The 64 x 8 = 512 vectors of a
batch use the codes with a perplexity of 335; over the whole set all 1,024 codes are used, with a
perplexity of 826. In the grid, outlines and shapes are clean; rare colours and some faces are
smudged.

The network is that of `openmoji_kl.py`. An image becomes 64 codes of 10 bits, which are few enough
for a transformer on a CPU. The codes follow moving averages, which keeps all of them in use.
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
