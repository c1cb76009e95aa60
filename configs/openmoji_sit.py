"""Flow matching with a transformer: OpenMoji people and faces, in pixels.

    python -m conprediff_jax.main --config=configs/openmoji_sit.py
    python -m conprediff_jax.sample --workdir=runs/openmoji_sit --num=64 --out=grid.png

Size: 32 x 32, 4.2 M parameters.
Needs: nothing.
Hardware: 2 CPU cores. The run takes 3 GB of memory.
Hours: 0.5 (4,000 steps at 2.2 to 2.4 a second, on cores that had other work).
Expected: not measured to the end. After 1,100 steps the shapes of busts can be recognised, and
their outlines are not yet clean.

A small SiT of 4,177,776 parameters: a patch of 4 x 4 pixels is a point and a token, as in
configs/openmoji.py. It predicts x_0, of which the velocity is made (docs/processes.md): a network
that sees patches passes their noise through badly, which predicting the velocity would require.
Middle times are drawn more often, and samples follow the flow by Heun's method.
"""

from conprediff_jax.config import default, section
from conprediff_jax.diffusion import FlowProcess
from conprediff_jax.models.dit import DiT
from conprediff_jax.sampling.spec import FlowSampling


def get_config():
    config = default().unlock()
    config.data.update(name="openmoji/people", image_size=32)
    config.first_stage.patch = 4
    config.process = section(FlowProcess, kind="flow", prediction="x0", times="logit_normal")
    config.model = section(DiT, kind="dit", width=192, num_layers=6, num_heads=6, patch=1)
    config.context.update(weight=0.09, points_per_example=16, warmup_steps=500)
    config.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_steps=100, b2=0.99)
    config.train.update(
        steps=4000,
        batch_size=16,
        ema_decay=0.995,
        log_every=50,
        sample_every=1000,
        checkpoint_every=1000,
    )
    config.sampling = section(FlowSampling, sampler="heun", steps=25, clip=1.0)
    return config.lock()
