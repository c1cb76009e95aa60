"""COCO 256, text-to-image: latent diffusion's 872 M UNet on captions, with context prediction.

    python -m conprediff_jax.main --config=configs/coco.py
    python -m conprediff_jax.sample --workdir=runs/coco --guidance=5 --prompt="a red bus"

Data: TFDS `coco_captions`. An image has several captions; every epoch draws one of them anew.
First stage: KL-f8 in weights/kl-f8. This is a diffusers AutoencoderKL (config.json and
diffusion_pytorch_model.safetensors), or a workdir of ours.
Text encoder: latent diffusion's, with 32 layers. It is trained along with the denoiser, and its
vocabulary is learnt from the captions. To start from the published model instead, import it
(`python -m conprediff_jax.convert import`), and name the imported folder in
--config.train.init_from. For BERT's own vocabulary, also give
--config.text.tokenizer=weights/bert-base-uncased/tokenizer.json.
Hardware: TPU v5e-64 (--config.mesh.fsdp=8) or four hosts of eight GPUs. Activations are bf16,
parameters float32. The 1,415,195,844 parameters take 28 GB with optimiser, gradients and moving
average, which fsdp divides over devices.
Hours: not measured.
Expected: latent diffusion reports a zero-shot FID of 12.63 after LAION-400M (arXiv 2112.10752,
table 2); the paper reports 6.21 after training on more data (arXiv 2401.02015). Batch and learning
rate for COCO alone are ours. We have not run this config to the end, so there is no number of ours
yet.
"""

from conprediff_jax.config import presets


def get_config():
    config = presets.ldm_text(weights="weights/kl-f8").unlock()
    config.data.name = "coco_captions"
    config.text.prompts = (
        "a red bus in the street",
        "two zebras on a field",
        "a plate of food on a table",
    )
    return config.lock()
