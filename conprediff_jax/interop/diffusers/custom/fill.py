"""Filling holes in images by RePaint, with diffusers' models and schedulers alone.

pipeline = DiffusionPipeline.from_pretrained(
    folder, custom_pipeline=folder, trust_remote_code=True
)
images = pipeline(image, mask, num_inference_steps=250).images  # the mask is white where known
"""

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, RePaintScheduler
from diffusers.utils.torch_utils import randn_tensor

_OPTIONS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "clip_sample")


class ExportedPipeline(DiffusionPipeline):
    """Fills holes with a model of pixels that predicts noise, as `RePaintPipeline` does."""

    def __init__(self, unet, scheduler):
        super().__init__()
        options = {name: scheduler.config[name] for name in _OPTIONS if name in scheduler.config}
        self.register_modules(unet=unet, scheduler=RePaintScheduler(**options))

    @torch.no_grad()
    def __call__(
        self,
        image,
        mask,
        num_inference_steps=250,
        eta=0.0,
        jump_length=10,
        jump_n_sample=10,
        generator=None,
        output_type="pil",
    ):
        """Fills the holes of images.

        Args:
            image: A PIL image or a list of them, of the size that the model takes.
            mask: A PIL image or a list of them, white where pixels are known.
            num_inference_steps: The number of steps.
            eta: The share of DDPM's noise that is added in each step.
            jump_length: The number of steps that are gone back at a time.
            jump_n_sample: How often a part is drawn.
            generator: A torch generator, which makes the fillings repeatable.
            output_type: 'pil', or 'np' for float arrays in [0, 1].
        """
        known = _stacked(image, "RGB").permute(0, 3, 1, 2) * 2 - 1
        where = (_stacked(mask, "L")[:, None] >= 0.5).float().expand(len(known), -1, -1, -1)
        known, where = (x.to(self.device, self.unet.dtype) for x in (known, where))
        x = randn_tensor(known.shape, generator=generator, device=self.device, dtype=known.dtype)
        self.scheduler.set_timesteps(num_inference_steps, jump_length, jump_n_sample, self.device)
        self.scheduler.eta = eta
        last = self.scheduler.timesteps[0] + 1
        for t in self.progress_bar(self.scheduler.timesteps):
            if t < last:
                noise = self.unet(x, t).sample
                x = self.scheduler.step(noise, t, x, known, where, generator).prev_sample
            else:
                x = self.scheduler.undo_step(x, last, generator)
            last = t
        images = (x / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy()
        return ImagePipelineOutput(
            images=self.numpy_to_pil(images) if output_type == "pil" else images
        )


def _stacked(images, mode):
    """PIL images as floats in [0, 1], stacked."""
    images = images if isinstance(images, list) else [images]
    arrays = [np.asarray(image.convert(mode), np.float32) / 255 for image in images]
    return torch.from_numpy(np.stack(arrays))
