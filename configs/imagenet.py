"""ImageNet 256, class-conditional: LDM-4's UNet with a class embedding, and context prediction.

    python -m conprediff_jax.main --config=configs/imagenet.py

Data: TFDS `imagenet2012`. You fetch its archives by hand; the command says which archives, and
where to put them.
First stage: the same as for configs/celebahq.py.
Hardware: TPU v5e-64 or four hosts of eight GPUs. Activations are bf16, parameters float32.
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
