"""ImageNet 256, class-conditional: LDM-4's UNet with a class embedding, and context prediction.

    python -m conprediff_jax.main --config=configs/imagenet.py

Data: TFDS `imagenet2012`; its archives are fetched by hand, and the command says which and where.
First stage: as for configs/celebahq.py.
Hardware: TPU v5e-64 or four hosts of eight GPUs; bf16 activations, float32 parameters.
Hours: not measured.
Expected: the published class-conditional LDM-4 attends to its class; this one adds it to the time
embedding, as ADM does, so that no published number belongs to it. Not run by us.
"""

from conprediff_jax import presets


def get_config():
    config = presets.ldm_4(weights="weights/vq-f4")
    config.data.update(name="imagenet2012", crop="random", label="label")
    config.model.update(channels=192, channel_mult=(1, 2, 3, 5), num_classes=1000)
    config.optimizer.learning_rate = 1e-4
    config.train.batch_size = 256
    return config
