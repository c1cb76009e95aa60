"""Discrete diffusion of tokens (VQ-Diffusion), with diffusers' models and schedulers alone.

pipeline = DiffusionPipeline.from_pretrained(
    folder, custom_pipeline=folder, trust_remote_code=True
)
images = pipeline(["a caption"] * 4, num_inference_steps=100, guidance_scale=5.0).images
"""

import json
import os
import pathlib

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

_NULL = "learned_classifier_free_sampling_embeddings"


class ExportedPipeline(DiffusionPipeline):
    """Reveals masked tokens and decodes them, as diffusers' `VQDiffusionPipeline` does."""

    def __init__(self, vqvae, text_encoder, tokenizer, transformer, scheduler):
        super().__init__()
        self.register_modules(
            vqvae=vqvae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
            scheduler=scheduler,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt,
        num_inference_steps=100,
        guidance_scale=5.0,
        truncation_rate=1.0,
        generator=None,
        output_type="pil",
    ):
        """Draws an image for each caption.

        Args:
            prompt: A caption, or a list of captions. A model without captions ignores them.
            num_inference_steps: All steps of the process; the scheduler does not skip times.
            guidance_scale: The scale of guidance; up to 1 for none.
            truncation_rate: The probability that the likeliest tokens keep; 1 for all.
            generator: A torch generator, which makes the images repeatable.
            output_type: 'pil', or 'np' for float arrays in [0, 1].
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        text = self._encode(prompts)
        guides = guidance_scale > 1
        if guides:
            text = torch.cat([self._null(len(prompts), text), text])
        mask = self.transformer.config.num_vector_embeds - 1
        side = self.transformer.config.sample_size
        tokens = torch.full((len(prompts), side * side), mask, device=self.device)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        for t in self.progress_bar(self.scheduler.timesteps):
            given = torch.cat([tokens] * 2) if guides else tokens
            logits = self.transformer(given, encoder_hidden_states=text, timestep=t).sample
            if guides:
                without, with_text = logits.chunk(2)
                logits = without + guidance_scale * (with_text - without)
                logits = logits - torch.logsumexp(logits, dim=1, keepdim=True)
            logits = _truncated(logits, truncation_rate).clamp(-70)
            tokens = self.scheduler.step(logits, t, tokens, generator=generator).prev_sample
        shape = (len(prompts), side, side, self.vqvae.config.vq_embed_dim)
        codes = self.vqvae.quantize.get_codebook_entry(tokens, shape=shape)
        images = self.vqvae.decode(codes, force_not_quantize=True).sample
        images = (images / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy()
        return ImagePipelineOutput(
            images=self.numpy_to_pil(images) if output_type == "pil" else images
        )

    def _encode(self, prompts):
        """The encoded captions, each token of length 1."""
        ids = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        encoded = self.text_encoder(ids.to(self.device))[0]
        return encoded / encoded.norm(dim=-1, keepdim=True)

    def _null(self, count, text):
        """The encoding of no caption: learned, or that of the empty caption."""
        config = json.loads(pathlib.Path(self._file("config.json")).read_text(encoding="utf-8"))
        if not config["learnable"]:
            return self._encode([""] * count)
        null = load_file(self._file("diffusion_pytorch_model.safetensors"))["embeddings"]
        return null.to(text).expand(count, -1, -1)

    def _file(self, name):
        """The path of a file of the null text, in the folder or the repository of the pipeline."""
        if os.path.isdir(self.name_or_path):
            return os.path.join(self.name_or_path, _NULL, name)
        return hf_hub_download(self.name_or_path, f"{_NULL}/{name}")


def _truncated(logits, rate):
    """Log-probabilities without those of the unlikeliest tokens, beyond the probability `rate`."""
    ordered, indices = torch.sort(logits, dim=1, descending=True)
    kept = ordered.exp().cumsum(dim=1) < rate
    kept = torch.cat([torch.ones_like(kept[:, :1]), kept[:, :-1]], dim=1)
    return logits.masked_fill(~kept.gather(1, indices.argsort(1)), -torch.inf)
