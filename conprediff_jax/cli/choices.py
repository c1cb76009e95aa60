"""The names that flags offer as choices, written out so that `--help` imports no library.

tests/test_documented.py compares them with the libraries that they come from.
"""

SAMPLERS = ("ddpm", "ddim", "dpm_solver", "euler", "heun", "sde")
REVEALS = ("posterior", "random", "purity", "confidence")
MASKS = ("thin", "strokes", "thick", "every_second_line", "super_resolve", "expand", "half", "box")
QUALITIES = ("fast", "best")
FITS = ("crop", "pad", "resize", "keep")
POLARITIES = ("keep", "fill")
LPIPS_NETWORKS = ("alexnet", "vgg16")
METRICS = ("frechet", "spatial", "kernel", "score", "precision", "recall")
ENOUGH = 2048  # images of a Frechet distance
WRITTEN = ("inference", "safetensors", "diffusers", "stablehlo")
READ = ("diffusers", "safetensors", "dit", "sit", "ldm", "adm", "vq-diffusion")
TOPOLOGIES = "v5e:4x4, v5p:2x4x4, or Cloud's v5e-16, v4-128 (64 chips), v5p-64 (32 chips)"
