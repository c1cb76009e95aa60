"""ImageNet 256, class-conditional: LDM-4's UNet with context prediction.

    python -m conprediff_jax.main --config=configs/imagenet.py

Size: 256 x 256, 263.9 M parameters.
Needs:
    imagenet2012: the data. TFDS cannot fetch its archives; python -m conprediff_jax.prepare
        --name=imagenet2012 says which archives to put where, and then prepares them.
    weights/vq-f4: the first stage VQ-f4, a diffusers VQModel. The flag
        --config.first_stage.weights=hf://CompVis/ldm-celebahq-256/vqvae?bin downloads the published
        one. Or train it: python -m conprediff_jax.main --config=configs/first_stage/vq_f4.py
        --workdir=weights/vq-f4
Hardware: a TPU v5e-64 or four hosts of eight GPUs. Activations are bf16, parameters float32.
Hours: not measured.
Expected: no published number belongs to this model. The published class-conditional LDM-4 attends
to its class; this one adds the class to the time embedding, as ADM does. We have not run this
config.
"""

from conprediff_jax.config import presets


def get_config():
    config = presets.ldm_4(weights="weights/vq-f4")
    config.data.update(name="imagenet2012", crop="random", label="label")
    config.model.update(channels=192, channel_mult=(1, 2, 3, 5), num_classes=1000)
    config.optimizer.learning_rate = 1e-4
    config.train.batch_size = 256
    return config
