"""COCO 256, text to image, discrete: VQ-Diffusion with context prediction.

    python -m conprediff_jax.main --config=configs/coco_discrete.py
    python -m conprediff_jax.sample --workdir=runs/coco_discrete --guidance=5 --prompt="a red bus"

Size: 256 x 256, 388.8 M parameters.
Needs:
    coco_captions: the data, by python -m conprediff_jax.prepare --name=coco_captions
    weights/vqgan-f8-openimages: the first stage VQGAN-f8 with 8,192 codes, a diffusers VQModel
        (config.json and diffusion_pytorch_model.safetensors) or a workdir of ours: python -m
        conprediff_jax.main --config=configs/first_stage/vq_f16.py
        --config.autoencoder.num_codes=8192 --config.autoencoder.channel_mult="(1,1,2,4)"
        --config.autoencoder.attention_downsampling=8 --workdir=weights/vqgan-f8-openimages
    weights/clip-vit-base-patch32: the text encoder CLIP ViT-B/32, which stays frozen, and its
        tokenizer. Give --config.text.weights=hf://openai/clip-vit-base-patch32?bin
        --config.text.tokenizer=hf://openai/clip-vit-base-patch32 to download the published ones.
Hardware: a TPU v5e-64 or four hosts of eight GPUs. Activations are bf16, parameters float32. The
model has 388,780,871 parameters and the null text.
Hours: not measured.
Expected: VQ-Diffusion reports FID 13.86 (arXiv 2111.14822). The paper's 6.21 is zero-shot, after
training on more data (arXiv 2401.02015). We have not run this config to the end, so there is no
number of ours yet.

An image has several captions; every epoch draws one of them anew. The data use few of the codes, so
only the 2,887 most used ones are kept, as published. (The published codec chooses its codes by a
classifier; ours chooses them by distance.)
"""

from conprediff_jax.config import presets, text


def get_config():
    config = presets.vq_diffusion_f8(weights="weights/vqgan-f8-openimages", used_codes=2887)
    config.data.update(name="coco_captions", text="caption")
    folder = "weights/clip-vit-base-patch32"
    config.text = text(
        "clip",
        weights=folder,
        tokenizer=folder,
        unit=True,
        prompts=("a red bus in the street", "two zebras on a field", "a plate of food on a table"),
    )
    config.condition.dropout = 0.1
    return config.lock()
