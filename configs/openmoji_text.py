"""Text to image: OpenMoji people by their captions, in pixels.

    python -m conprediff_jax.main --config=configs/openmoji_text.py
    python -m conprediff_jax.sample --workdir=runs/openmoji_text --guidance=2 --num=8
        --prompt="woman firefighter dark skin tone"

Size: 32 x 32, 9.3 M parameters.
Needs: nothing.
Hardware: 2 CPU cores. The run takes 3 GB of memory.
Hours: 0.2 to 0.3 (3,000 steps at 2.5 to 4.2 a second).
Expected: a final loss of about 0.017 (denoise 0.0105, context 0.006 after weighting). With guidance
2, 88 % of the images show what a caption of the training set asks for, and 70 % show what a
held-out caption asks for. The drawings themselves reach 93 % and 82 % (docs/captions.md).

The captions combine a role, a gender and a skin tone. One skin tone of every role and gender is
held out (`openmoji/combinations`, split `test`). The vocabulary is learnt from the captions, and
the text encoder is trained along with the denoiser.
"""

from conprediff_jax.config import default, text


def get_config():
    config = default().unlock()
    config.data.update(name="openmoji/combinations", image_size=32, text="caption")
    config.first_stage.patch = 4
    config.text = text(
        "bert",
        vocab_size=512,
        length=16,
        width=128,
        num_layers=2,
        num_heads=4,
        head_channels=32,
        hidden=256,
        prompts=(
            "woman firefighter dark skin tone",
            "man farmer light skin tone",
            "person in lotus position medium skin tone",
            "man health worker medium-dark skin tone",
        ),
    )
    config.condition.dropout = 0.1
    config.process.update(
        schedule="cosine", prediction="x0", weighting="min_snr", snr_max=5.0, snr_min=0.5
    )
    config.model.update(
        channels=96,
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention_downsampling=(2,),
        head_channels=32,
    )
    config.context.update(weight=0.03, points_per_example=16, warmup_steps=500)
    config.optimizer.update(learning_rate=1.5e-3, schedule="cosine", warmup_steps=50)
    config.train.update(
        steps=3000,
        batch_size=32,
        ema_decay=0.995,
        log_every=50,
        sample_every=500,
        checkpoint_every=500,
    )
    config.sampling.update(guidance=2.0, num=32)
    return config.lock()
