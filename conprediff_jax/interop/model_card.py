"""The model card, `README.md`: what an exported model is, how to use it, how it was trained."""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from conprediff_jax.common.errors import FieldError
from conprediff_jax.interop import card_header, stablehlo
from conprediff_jax.interop.diffusers import custom
from conprediff_jax.interop.pretrained import Pretrained
from conprediff_jax.metrics import results
from conprediff_jax.models.first_stage import Pixels
from conprediff_jax.sampling import record

_USE = {
    "inference": """\
```
python -m conprediff_jax.sample   --workdir={folder} --num=16 --out=grid.png
python -m conprediff_jax.evaluate --workdir={folder} --reference=...
```

```python
import conprediff_jax

model = conprediff_jax.load("{folder}")
images = model.sample(16, seed=0)  # uint8
```
""",
    "safetensors": """\
The files hold parameters by path, in the layouts of Flax: kernels are `[height, width, in, out]`
and `[in, out]`. The metadata of each file hold the config. To sample from the model:

```
python -m conprediff_jax.convert import {folder} --from=safetensors --out=model
python -m conprediff_jax.sample --workdir=model --num=16 --out=grid.png
```
""",
    "DDIMPipeline": """\
```python
from diffusers import DDIMPipeline

pipeline = DDIMPipeline.from_pretrained("{folder}")
images = pipeline(
    batch_size=4, num_inference_steps={steps}, eta={eta}, use_clipped_model_output={clipped}
).images
```
""",
    "DDPMPipeline": """\
```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{folder}")
images = pipeline(batch_size=4, num_inference_steps={steps}).images
```
""",
    "LDMPipeline": """\
```python
from diffusers import LDMPipeline

pipeline = LDMPipeline.from_pretrained("{folder}")
images = pipeline(batch_size=4, num_inference_steps={steps}, eta={eta}).images
```
""",
    "LDMTextToImagePipeline": """\
```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{folder}")
images = pipeline(
    [{prompt}] * 4, num_inference_steps={steps}, eta={eta}, guidance_scale={guidance}
).images
```
""",
    "StableDiffusionPipeline": """\
```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("{folder}")
images = pipeline(
    [{prompt}] * 4, num_inference_steps={steps}, eta={eta}, guidance_scale={guidance}
).images
```

There is no safety checker. diffusers does not guide if the guidance is between 0 and 1.
""",
    "DiTPipeline": """\
```python
from diffusers import DiTPipeline

pipeline = DiTPipeline.from_pretrained("{folder}")
images = pipeline(
    class_labels=[207, 360, 387, 974], num_inference_steps={steps}, guidance_scale={guidance}
).images
```

diffusers does not guide if the guidance is between 0 and 1.
""",
    "VQDiffusionPipeline": """\
```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{folder}")
images = pipeline(
    [{prompt}] * 4,
    num_inference_steps={times},
    guidance_scale={guidance},
    truncation_rate={truncation},
).images
```

{prompt_note}`num_inference_steps` must be {times}: diffusers' scheduler does not skip times, so
fewer steps would begin in the middle.
""",
    "stablehlo": """\
The program needs `jax` alone, on CPU, CUDA or TPU. It draws any number of images, and image i
depends on the seed and i alone. {condition_note}The sampler and its steps are fixed in the program.
It is promised to load in {promise} (`program.json`). A later release may refuse it; then export the
model again.

```python
import jax
import numpy as np
from etils import epath
{tokenizers}from jax import export

folder = "{folder}"
with open(f"{{folder}}/sampler.stablehlo", "rb") as file:
    sampler = export.deserialize(bytearray(file.read()))
weights = dict(np.load(f"{{folder}}/weights.npz"))
indices = np.arange({count}, dtype=np.int32)
{tokens}images = jax.jit(sampler.call)(weights, np.int32(0), indices{condition})
np.savez("images.npz", images)  # uint8 [{count}, {shape}]
```
""",
}

_CUSTOM = """

`pipeline.py` in this folder {does}. It needs only diffusers' models and schedulers:

```python
pipeline = DiffusionPipeline.from_pretrained(
    "{folder}", custom_pipeline="{folder}", trust_remote_code=True
)
```
"""
_FILLS = "fills holes by RePaint, `pipeline(image, mask)`; the mask is white where pixels are known"
_STAYS = "does the same as diffusers' pipeline, which is deprecated there"

_NO_TEXT = """\
The prompt is ignored, since the model reads no text. The text encoder in this folder is there only
because the pipeline does not open without one. """

_TOKENS_NOTE = """\
The last argument holds the token ids of captions, `[images, {length}]`, from the library
`tokenizers`. """

_TOKENS = """\
tokenizer = tokenizers.Tokenizer.from_file(f"{{folder}}/tokenizer.json")
encoded = tokenizer.encode_batch([{prompt}] * {count})
tokens = np.array([caption.ids for caption in encoded], np.int32)
"""


def write(
    model: Pretrained,
    folder: pathlib.Path,
    *,
    kind: str,
    name: str,
    metrics: str | None = None,
    license: str | None = None,
) -> None:
    """Writes the card into a folder.

    Args:
        model: The model.
        folder: The folder.
        kind: The format, or the name of diffusers' pipeline; the card shows how to use it.
        name: The final name of the folder.
        metrics: The `metrics.json` of an evaluation; the card quotes its figures of the model.
        license: The identifier of the license, such as 'apache-2.0'; None for no entry.

    Raises:
        UserError: `metrics` is not such a file, or has no figures of these parameters.
    """
    rows = _rows(metrics, model)
    sections = [
        f"# {pathlib.Path(name).name}",
        _summary(model),
        "## Use",
        _use(model, kind, name, custom=(folder / custom.FILE).exists()),
        "## Model",
        _table(_model_rows(model)),
        "## Training",
        _table(_training_rows(model)),
        "## Metrics",
        results.markdown(rows) if rows else "There is no evaluation of these parameters.",
        "## Config",
        f"```json\n{json.dumps(json.loads(model.config.to_json()), indent=2)}\n```",
    ]
    card_header.write_card(
        folder,
        "\n\n".join(sections) + "\n",
        model.config,
        library="diffusers" if kind.endswith("Pipeline") else card_header.LIBRARY,
        trained=bool(model.step),
        origin=model.origin,
        license=license,
        metrics=list(dict.fromkeys(name for row in rows for name in row["metrics"])),
        task="text-to-image" if model.diffusion.text else "unconditional-image-generation",
    )


def _use(model: Pretrained, kind: str, name: str, *, custom: bool) -> str:
    """How to use the folder, and the custom pipeline in it if there is one."""
    text = _USE[kind].format(folder=name, **_values(model)).rstrip()
    if not custom:
        return text
    pixels = isinstance(model.diffusion.first_stage, Pixels)
    return text + _CUSTOM.format(folder=name, does=_FILLS if pixels else _STAYS).rstrip()


def _summary(model: Pretrained) -> str:
    text = (
        "A diffusion model for conprediff_jax: an average of the denoiser's parameters over "
        "training, with its first stage and schedule. "
    )
    if model.config.context.weight and model.step:
        text += (
            "It was trained with context prediction (ConPreDiff, arXiv 2401.02015). The context "
            "decoder is not part of it, since only training uses the decoder."
        )
    return text.rstrip()


def _values(model: Pretrained) -> dict[str, Any]:
    """The values in the snippets of `_USE`."""
    diffusion, sampling = model.diffusion, model.diffusion.sampling
    classes, count = diffusion.num_classes, 8
    values = {
        "steps": sampling.steps,
        "eta": getattr(sampling, "eta", 0.0),
        "clipped": getattr(sampling, "clipped_epsilon", True),
        "guidance": sampling.guidance,
        "times": getattr(diffusion.process, "num_steps", None),  # None for continuous time
        "truncation": getattr(sampling, "truncation", 1.0),
        "count": count,
        "shape": ", ".join(map(str, (*diffusion.image_shape, diffusion.channels))),
        "promise": stablehlo.PROMISE.format(version=jax.__version__),
        "prompt": json.dumps(
            diffusion.text.prompts[0] if diffusion.text else "", ensure_ascii=False
        ),
        **dict.fromkeys(("prompt_note", "condition", "condition_note", "tokens", "tokenizers"), ""),
    }
    if not diffusion.text:
        values["prompt_note"] = _NO_TEXT
    if classes:
        values["condition"] = f", np.arange({count}, dtype=np.int32) % {classes}"
        values["condition_note"] = f"The last argument holds classes, 0 to {classes - 1}. "
    if diffusion.text:
        values["condition"] = ", tokens"
        values["condition_note"] = _TOKENS_NOTE.format(length=diffusion.text.encoder.length)
        values["tokenizers"] = "import tokenizers\n"
        values["tokens"] = _TOKENS.format(**values)
    return values


def _model_rows(model: Pretrained) -> dict[str, Any]:
    config, diffusion = model.config, model.diffusion
    sizes = {
        name: sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(network))
        for name, network in model.networks.items()
    }
    rows = {
        "images": " x ".join(map(str, diffusion.image_shape[::-1])),
        "points": " x ".join(map(str, diffusion.point_shape)),
        "first stage": config.first_stage.kind,
        "denoiser": f"{type(diffusion.denoiser).__name__}, {sizes['denoiser']:,} parameters",
        "classes": diffusion.num_classes or "none",
        "process": ", ".join(f"{k} {v}" for k, v in config.process.items()),
        "sampling": ", ".join(f"{k} {v}" for k, v in config.sampling.items() if k != "num"),
    }
    if diffusion.text:
        kind = type(diffusion.text.encoder).__name__
        rows["captions"] = (
            f"{kind}, {sizes['text_encoder']:,} parameters, {diffusion.text.encoder.length} tokens "
            f"from a vocabulary of {diffusion.text.tokenize.vocab_size}"
        )
    if "scale" in model.frozen:
        rows["scale of latents"] = float(model.frozen["scale"])
    return rows


def _training_rows(model: Pretrained) -> dict[str, Any]:
    config = model.config
    if not model.step:
        return {"from": model.origin}
    context = "none"
    if config.context.weight:
        context = ", ".join(
            f"{key} {config.context[key]}" for key in ("strides", "transport", "weight", "samples")
        )
    return {
        "from": model.origin,
        "data": f"{config.data.name}, split {config.data.split}",
        "steps": f"{model.step:,} of {config.train.batch_size} examples",
        "context prediction": context,
        "learning rate": config.optimizer.learning_rate,
        "average of parameters": model.average or "not known",
        "seed": config.seed,
    }


def own_rows(path: str | os.PathLike, model: Pretrained) -> list[results.Row]:
    """The rows of an evaluation's `metrics.json` that are of a model's step and parameters.

    Raises:
        UserError: The file is missing, or holds no results.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FieldError("metrics", f"is {path}: there is no such file")
    parameters = record.parameters_of(model.params, model.frozen)
    wanted = {"step": model.step, "parameters": parameters}
    return [row for row in results.read_rows(path) if wanted.items() <= row["settings"].items()]


def _rows(path: str | None, model: Pretrained) -> list[results.Row]:
    """The figures of the model's own parameters, with all that they depend on.

    Raises:
        UserError: The file has none.
    """
    rows = own_rows(path, model) if path else []
    if path and not rows:
        raise FieldError(
            "metrics",
            f"is {path}, which has no figures of step {model.step} with these parameters: evaluate "
            "this step first",
        )
    return rows


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {v} |" for key, v in rows.items())])
