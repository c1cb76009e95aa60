"""COCO 256, text to image: latent diffusion with context prediction.

    python -m conprediff_jax.main --config=configs/coco.py
    python -m conprediff_jax.sample --workdir=runs/coco --guidance=5 --prompt="a red bus"

Size: 256 x 256, 1415.2 M parameters.
Needs:
    coco_captions: the data, by python -m conprediff_jax.prepare --name=coco_captions
    weights/kl-f8: the first stage KL-f8, a diffusers AutoencoderKL. The flag
        --config.first_stage.weights=hf://stabilityai/sd-vae-ft-mse downloads the published one. Or
        train it: python -m conprediff_jax.main --config=configs/first_stage/kl_f8.py
        --workdir=weights/kl-f8

Hardware: a TPU v5e-64 or four hosts of eight GPUs. By its plan a chip of v5e-64 needs 15.1 GB with
the default mesh (docs/plans.md); --config.mesh.fsdp=8 divides the gathered parameters and the
gradients, too. Activations are bf16, parameters float32. The 1,415,195,844 parameters take 28 GB
with optimiser, gradients and moving average, most of which devices divide.
Hours: not measured.
Expected: latent diffusion reports a zero-shot FID of 12.63 after LAION-400M (arXiv 2112.10752,
table 2); the paper reports 6.21 after training on more data (arXiv 2401.02015). Batch and learning
rate for COCO alone are ours. We have not run this config to the end, so there is no number of ours
yet.

An image has several captions; every epoch draws one of them anew. The text encoder is latent
diffusion's, with 32 layers. It is trained along with the denoiser, and its vocabulary is learnt
from the captions. To start from the published model instead, import it
(`python -m conprediff_jax.convert import`), and name the imported folder in
--config.train.init_from. For BERT's own vocabulary, also give
--config.text.tokenizer=hf://google-bert/bert-base-uncased.
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
