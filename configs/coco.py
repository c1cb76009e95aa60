"""COCO 256, text-to-image: latent diffusion's 872 M UNet on captions, with context prediction.

    python -m conprediff_jax.main --config=configs/coco.py
    python -m conprediff_jax.sample --workdir=runs/coco --guidance=5 --prompt="a red bus"

Data: TFDS `coco_captions`; of an image's captions one is drawn anew every epoch.
First stage: KL-f8 in weights/kl-f8: a diffusers AutoencoderKL (config.json and
diffusion_pytorch_model.safetensors), or a workdir of ours.
Text encoder: latent diffusion's, 32 layers, trained along; its vocabulary is learnt from the
captions. To start from the published model instead, import it (`python -m conprediff_jax.convert
import`), then give --config.train.init_from and, for BERT's own vocabulary,
--config.text.tokenizer=weights/bert-base-uncased/tokenizer.json.
Hardware: TPU v5e-64 (--config.mesh.fsdp=8) or four hosts of eight GPUs; bf16 activations, float32
parameters: 1,415,195,844, and 28 GB with optimiser, gradients and moving average, divided by fsdp.
Hours: not measured.
Expected: latent diffusion reports a zero-shot FID of 12.63 after LAION-400M (arXiv 2112.10752,
table 2), the paper 6.21 after training on more data (arXiv 2401.02015). Batch and learning rate
for COCO alone are ours. Not run to the end by us: no number of ours yet.
"""

from conprediff_jax import presets


def get_config():
    config = presets.ldm_text(weights="weights/kl-f8").unlock()
    config.data.name = "coco_captions"
    config.text.prompts = (
        "a red bus in the street",
        "two zebras on a field",
        "a plate of food on a table",
    )
    return config.lock()
