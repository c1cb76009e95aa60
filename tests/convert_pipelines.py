"""Whole diffusers pipelines that start from our noise.

diffusers draws its noise with torch. These pipelines get our noise instead, so that whole sampling
loops can be compared.
"""

import diffusers
import jax
import numpy as np
import torch
from convert_tiny import keys
from diffusers.pipelines.ddim import pipeline_ddim
from diffusers.pipelines.ddpm import pipeline_ddpm
from diffusers.pipelines.deprecated.latent_diffusion_uncond import (
    pipeline_latent_diffusion_uncond as pipeline_ldm,
)
from diffusers.pipelines.dit import pipeline_dit
from diffusers.schedulers import scheduling_ddpm, scheduling_vq_diffusion

from conprediff_jax.diffusion.samplers import step_noise


def to_torch(x):
    return torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())


def theirs(monkeypatch, folder, model, num, prompts=None, labels=None):
    """Images of the pipeline in a folder, drawn with the noise of our images 0 to num - 1."""
    task = model.diffusion
    prior, steps = keys(num)
    x_T = np.array(task.process.prior(prior, task.point_shape))
    calls = iter(range(100))
    for module in (pipeline_ddim, pipeline_ddpm, pipeline_ldm, pipeline_dit):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: to_torch(x_T))
    monkeypatch.setattr(
        scheduling_ddpm,
        "randn_tensor",
        lambda *_, **__: to_torch(step_noise(steps, next(calls), x_T.shape[1:])),
    )

    def gumbel_noised(logits, generator):
        """Ours has the codes last, and the mask in every step; theirs has none in the last."""
        index, shape = next(calls), (*task.point_shape, task.process.num_codes + 1)
        draw = jax.vmap(
            lambda key: jax.random.gumbel(jax.random.fold_in(key, index), shape, mode="high")
        )
        noise = np.asarray(draw(steps)).reshape(num, -1, shape[-1]).transpose(0, 2, 1)
        return logits + torch.from_numpy(noise[:, : logits.shape[1]].copy())

    monkeypatch.setattr(scheduling_vq_diffusion, "gumbel_noised", gumbel_noised)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": task.sampling.steps, "output_type": "np"}
    if hasattr(pipeline, "tokenizer"):
        settings["prompt"] = prompts or [""] * num
        settings["guidance_scale"] = task.sampling.guidance
    elif labels is None:
        settings["batch_size"] = num
    else:
        settings |= {"class_labels": labels, "guidance_scale": task.sampling.guidance}
    match type(pipeline).__name__:
        case "DDIMPipeline":
            settings["use_clipped_model_output"] = task.sampling.clipped_epsilon
        case "LDMTextToImagePipeline" | "StableDiffusionPipeline":
            settings["latents"] = to_torch(x_T)
    return np.round(pipeline(**settings).images * 255).astype(np.uint8), pipeline


def assert_same_images(ours, theirs):
    """Up to one grey level; and images, not one colour."""
    assert ours.shape == theirs.shape
    assert ours.std() > 10
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def randomised(module, seed=0):
    """Every weight moved off its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return module


def their_unet(channels, **options):
    """A tiny UNet2DModel of points of 4 x 4."""
    architecture = {
        "sample_size": 4,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 16,
    }
    return randomised(diffusers.UNet2DModel(**architecture | options))
