"""The trainer: where data, process, denoiser and context meet."""
