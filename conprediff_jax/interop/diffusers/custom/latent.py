"""Unconditional latent diffusion, with diffusers' models and schedulers alone.

pipeline = DiffusionPipeline.from_pretrained(
    folder, custom_pipeline=folder, trust_remote_code=True
)
images = pipeline(batch_size=4, num_inference_steps=50).images
"""

import inspect

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class ExportedPipeline(DiffusionPipeline):
    """Draws latents with a UNet and decodes them, as diffusers' `LDMPipeline` does."""

    def __init__(self, vqvae, unet, scheduler):
        super().__init__()
        self.register_modules(vqvae=vqvae, unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, batch_size=1, generator=None, eta=0.0, num_inference_steps=50, output_type="pil"
    ):
        """Draws images.

        Args:
            batch_size: The number of images.
            generator: A torch generator, which makes the images repeatable.
            eta: The share of DDPM's noise that DDIM adds.
            num_inference_steps: The number of steps.
            output_type: 'pil', or 'np' for float arrays in [0, 1].
        """
        side = self.unet.config.sample_size
        latents = randn_tensor(
            (batch_size, self.unet.config.in_channels, side, side),
            generator=generator,
            device=self.device,
            dtype=self.unet.dtype,
        )
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        latents = latents * self.scheduler.init_noise_sigma
        known = inspect.signature(self.scheduler.step).parameters
        options = {"eta": eta, "generator": generator}
        options = {name: value for name, value in options.items() if name in known}
        for t in self.progress_bar(self.scheduler.timesteps):
            noise = self.unet(self.scheduler.scale_model_input(latents, t), t).sample
            latents = self.scheduler.step(noise, t, latents, **options).prev_sample
        images = self.vqvae.decode(latents / self.vqvae.config.scaling_factor).sample
        images = (images / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy()
        return ImagePipelineOutput(
            images=self.numpy_to_pil(images) if output_type == "pil" else images
        )
