"""Published models, as whole configs.

Latent diffusion: Rombach et al. 2022, arXiv 2112.10752, appendix E; VQ-Diffusion: Gu et al. 2022,
arXiv 2111.14822, section 4 and the published configurations; DiT: Peebles and Xie 2022, arXiv
2212.09748, section 4; SiT: Ma et al. 2024, arXiv 2401.08740, section 3.

Each function returns a whole config, with context prediction at the strides of the paper (arXiv
2401.02015). A config file adds its data. Backbones, schedules and learning rates are as published.
The weight and the warm-up of the context loss are ours, since the paper does not state them.
"""

from typing import Any

from ml_collections import ConfigDict

from conprediff_jax.config.denoising import default, default_discrete, latents, text, tokens
from conprediff_jax.config.sections import section
from conprediff_jax.diffusion.flow import FlowProcess
from conprediff_jax.models.dit import SIZES, DiT
from conprediff_jax.sampling.spec import FlowSampling
from conprediff_jax.weights.original.dit import SIT_TIME

# What transformers keep of a block for the backward pass, which the compiler cannot choose where
# blocks run as one loop. On TPUs it needs half the memory of keeping everything, and the same FLOPs
# but for those of attention (docs/plans.md).
_KEEP_PRODUCTS = {"remat": True, "remat_policy": "products"}


def ldm_4(weights: str) -> ConfigDict:
    """LDM-4 with the VQ-f4 first stage: 64 x 64 x 3 latents, a UNet of 274,056,163 parameters.

    Args:
        weights: Path of the first stage's weights; see `models.first_stage.Autoencoded`.
    """
    config = _latent_diffusion()
    config.first_stage = latents("vq", weights, scale=1.0)
    config.model.update(
        channels=224,
        channel_mult=(1, 2, 3, 4),
        blocks_per_level=2,
        attention_downsampling=(2, 4, 8),
        head_channels=32,
    )
    config.optimizer.learning_rate = 2e-6 * 48
    config.train.batch_size = 48
    return config


def ldm_8(weights: str) -> ConfigDict:
    """LDM-8 with the KL-f8 first stage: 32 x 32 x 4 latents, a UNet of 294,966,916 parameters.

    Args:
        weights: Path of the first stage's weights; see `models.first_stage.Autoencoded`.
    """
    config = _latent_diffusion()
    # Latents are divided by their standard deviation, which is measured over the first batches.
    config.first_stage = _kl_f8(weights, scale=None)
    config.process.update(beta_end=0.0155, loss_norm="l1")
    config.model.update(
        channels=192,
        channel_mult=(1, 2, 2, 4, 4),
        blocks_per_level=2,
        attention_downsampling=(1, 2, 4, 8),
        num_heads=8,
        head_channels=None,
        scale_shift_norm=True,
        resblock_updown=True,
    )
    config.optimizer.learning_rate = 5e-5
    config.train.batch_size = 96
    return config


def ldm_text(weights: str, tokenizer: str = "") -> ConfigDict:
    """Latent diffusion's text-to-image model: KL-f8, a UNet of 872,300,484 parameters.

    Its text encoder has 32 layers and BERT's vocabulary, and is trained with the denoiser.

    Args:
        weights: Path of the first stage's weights; see `models.first_stage.Autoencoded`.
        tokenizer: BERT's uncased tokenizer; see `sampling.text.TextCondition`.
    """
    config = _latent_diffusion().unlock()
    config.first_stage = _kl_f8(weights)
    config.data.text = "caption"
    config.text = text("bert", tokenizer=tokenizer)
    config.condition.update(dropout=0.1, null="empty")
    config.process.update(beta_start=0.00085, beta_end=0.012)
    config.model.update(
        channels=320,
        channel_mult=(1, 2, 4, 4),
        blocks_per_level=2,
        attention_downsampling=(1, 2, 4),
        num_heads=8,
        head_channels=None,
    )
    config.optimizer.learning_rate = 1e-4
    config.train.batch_size = 256
    config.sampling.guidance = 5.0
    return config.lock()


def dit(weights: str, size: str = "XL", patch: int = 2) -> ConfigDict:
    """DiT by class, on the 32 x 32 x 4 latents of KL-f8; XL/2 has 674,816,272 parameters.

    The published network also predicts the variance of its steps, with 18,448 parameters more. Here
    the variance is fixed.

    Args:
        weights: Path of the first stage's weights; see `models.first_stage.Autoencoded`.
        size: A key of `models.dit.SIZES`.
        patch: The side of a patch in latents.
    """
    config = default().unlock()
    config.dtype = "bfloat16"
    config.data.update(image_size=256, flip=True)
    config.first_stage = _kl_f8(weights)
    config.process.update(schedule="linear", num_steps=1000, beta_start=1e-4, beta_end=0.02)
    config.model = section(
        DiT, kind="dit", **SIZES[size], patch=patch, num_classes=1000, **_KEEP_PRODUCTS
    )
    config.condition.dropout = 0.1
    config.context.update(weight=0.03, points_per_example=256, warmup_steps=20_000)
    config.optimizer.update(learning_rate=1e-4, weight_decay=0.0, clip_norm=0.0)
    config.train.update(steps=400_000, batch_size=256, ema_decay=0.9999)
    config.sampling.update(steps=50, spacing="leading", clip=0.0, guidance=4.0, num=16)
    return config.lock()


def sit(weights: str, size: str = "XL", patch: int = 2) -> ConfigDict:
    """SiT by class: the network of `dit`, trained by flow matching on the linear path.

    The network reads 1 - t, since times run in the other direction in the published code. Its
    sampler follows the stochastic differential equation in 250 steps, of which the published
    figures are.

    Args:
        weights: Path of the first stage's weights; see `models.first_stage.Autoencoded`.
        size: A key of `models.dit.SIZES`.
        patch: The side of a patch in latents.
    """
    config = dit(weights, size, patch).unlock()
    config.process = section(FlowProcess, kind="flow", time_scale=1.0)
    config.model.update(SIT_TIME)
    config.sampling = section(FlowSampling, sampler="sde", steps=250, guidance=4.0, num=16)
    return config.lock()


def vq_diffusion_f16(
    weights: str, num_codes: int = 1024, used_codes: int | None = None
) -> ConfigDict:
    """VQ-Diffusion on 16 x 16 tokens: 20 layers of width 512, with convolutional feed-forward.

    Args:
        weights: Path of the weights of the first stage, VQGAN-f16 (Esser et al. 2021, arXiv
            2012.09841); see `models.first_stage.Autoencoded`.
        num_codes: Number of codes of its codebook.
        used_codes: See `models.first_stage.Tokens`.
    """
    codec = {"channel_mult": (1, 1, 2, 2, 4), "attention_downsampling": (16,)}
    config = _vq_diffusion(weights, used_codes, num_codes=num_codes, **codec)
    config.process.auxiliary_weight = 1e-3
    config.model.update(width=512, num_layers=20, num_heads=16, convolutional=True)
    config.optimizer.update(learning_rate=4.5e-4, warmup_steps=5000)
    return config


def vq_diffusion_f8(weights: str, used_codes: int) -> ConfigDict:
    """VQ-Diffusion on 32 x 32 tokens, for captions: 19 layers of width 1024.

    Args:
        weights: Path of the weights of the first stage, VQGAN-f8 with 8,192 codes; see
            `models.first_stage.Autoencoded`.
        used_codes: See `models.first_stage.Tokens`.
    """
    codec = {"channel_mult": (1, 1, 2, 4), "attention_downsampling": (8,)}
    config = _vq_diffusion(weights, used_codes, num_codes=8192, **codec)
    config.process.auxiliary_weight = 5e-4
    config.model.update(width=1024, num_layers=19, num_heads=16)
    config.optimizer.update(learning_rate=2e-4, warmup_steps=1000)
    return config


def vq_diffusion_ithq(weights: str, tokenizer: str = "", text_weights: str = "") -> ConfigDict:
    """Improved VQ-Diffusion as trained on ITHQ, for captions: 36 layers of width 1408, 4,096 codes.

    Args:
        weights: Path of the first stage's weights; see `models.first_stage.Autoencoded`.
        tokenizer: CLIP's tokenizer; see `sampling.text.TextCondition`.
        text_weights: Folder of the weights of CLIP ViT-B/32; see `sampling.text.TextCondition`.
    """
    codec = {"channel_mult": (1, 2, 4, 8), "attention_downsampling": (8,), "embed_dim": 128}
    config = _vq_diffusion(weights, None, num_codes=4096, channels=64, **codec)
    config.process.auxiliary_weight = 5e-4
    config.data.text = "caption"
    config.text = text("clip", weights=text_weights, tokenizer=tokenizer, unit=True)
    config.condition.dropout = 0.1
    config.model.update(width=1408, num_layers=36, num_heads=16)
    config.sampling.guidance = 5.0
    return config


def _vq_diffusion(weights: str, used_codes: int | None, **codec: Any) -> ConfigDict:
    codec = {"channels": 128, "latent_channels": 256} | codec
    first_stage = tokens(weights, used_codes, **codec)
    config = default_discrete(first_stage).unlock()
    config.dtype = "bfloat16"
    config.model.update(_KEEP_PRODUCTS)
    config.data.update(image_size=256, flip=True, label=None)
    # The loss is in nats per token, about a hundred times the loss of continuous models.
    config.context.update(weight=0.3, points_per_example=64, warmup_steps=20_000)
    # Published: a moving average of decay 0.99, updated every 25 steps.
    config.train.update(steps=500_000, batch_size=256, ema_decay=0.9996)
    config.sampling.num = 16
    return config


def _kl_f8(weights: str, scale: float | None = 0.18215) -> ConfigDict:
    """The first stage KL-f8, by default with the scale of its latents in Stable Diffusion."""
    return latents("kl", weights, scale=scale, channel_mult=(1, 2, 4, 4), latent_channels=4)


def _latent_diffusion() -> ConfigDict:
    config = default().unlock()
    config.dtype = "bfloat16"
    config.data.update(image_size=256, flip=True, label=None)
    config.process.update(
        schedule="scaled_linear", num_steps=1000, beta_start=0.0015, beta_end=0.0195
    )
    config.context.update(weight=0.03, points_per_example=256, warmup_steps=20_000)
    config.optimizer.update(warmup_steps=10_000, weight_decay=0.01)
    config.train.update(steps=500_000, ema_decay=0.9999)
    # The original sampler visits range(0, T, T / steps) + 1 and ends at alpha_bar_0. It does not
    # clip, since latents have no fixed range.
    config.sampling.update(
        sampler="ddim",
        steps=200,
        spacing="leading",
        steps_offset=1,
        final="first",
        clip=0.0,
        num=16,
    )
    return config.lock()
