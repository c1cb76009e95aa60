"""CelebA-HQ 256, unconditional: LDM-4 with context prediction.

    python -m conprediff_jax.main --config=configs/celebahq.py

Data: TFDS `celeb_a_hq/256`. You fetch its files by hand; the command says which files, and where to
put them.
First stage: put diffusers' copy of VQ-f4 (CompVis/ldm-celebahq-256, folder `vqvae`: config.json and
diffusion_pytorch_model.safetensors) into weights/vq-f4, or train configs/first_stage/vq_f4.py.
Hardware: one host of eight GPUs, or a TPU v5e-16. Activations are bf16, parameters float32.
Hours: not measured.
Expected: the paper reports FID 3.22 with context prediction, and 5.11 for this backbone without it
(arXiv 2401.02015, 50,000 samples). We have not run this config to the end, so there is no number of
ours yet.
"""

from conprediff_jax.config import presets


def get_config():
    config = presets.ldm_4(weights="weights/vq-f4")
    config.data.update(name="celeb_a_hq/256")
    return config
