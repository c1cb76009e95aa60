"""First stages to the folders of diffusers' `AutoencoderKL` and `VQModel`.

The folder is what `from_pretrained` of these classes opens, and what `config.first_stage.weights`
of a later run takes. Its `scaling_factor` is 1: a first stage does not scale latents, and a
diffusion model that is trained on them measures its own factor.
"""

import json
import pathlib

import jax
import numpy as np

from conprediff_jax.interop import card_header
from conprediff_jax.interop.diffusers.files import write_part
from conprediff_jax.runs.restore import Restored
from conprediff_jax.tasks.first_stage import FirstStageTraining
from conprediff_jax.weights.diffusers import autoencoder as diffusers_autoencoder

_CARD = """\
# {name}

A first stage for diffusion models, trained with conprediff_jax: the moving average after {step}
steps. It maps images of {channels} channels, in [-1, 1], to latents of {latents}, with
{downsampling} pixels to a latent along each side.

## Use

```python
from diffusers import {family}

autoencoder = {family}.from_pretrained("{folder}")
```

In a config of conprediff_jax, `config.first_stage.weights = "{folder}"` takes the same folder.

## Config

```json
{config}
```
"""


def write(run: Restored, folder: pathlib.Path, *, name: str, license: str | None = None) -> None:
    """Writes the first stage of a run into an existing folder, with a card.

    Args:
        run: A run whose task is `FirstStageTraining`.
        folder: The folder.
        name: The final name of the folder.
        license: The identifier of the license; None for no entry in the card.

    Raises:
        DiffusersError: diffusers has no such autoencoder, for example where it has patches.
    """
    task: FirstStageTraining = run.task
    model, params = task.model, jax.tree.map(np.asarray, run.params)
    config = diffusers_autoencoder.config_to_diffusers(model, 1.0, max(task.data.image_shape[:2]))
    write_part(folder, config, diffusers_autoencoder.params_to_diffusers(params, model))
    card = _CARD.format(
        name=pathlib.Path(name).name,
        step=run.step,
        channels=model.out_channels,
        latents=f"{model.latent_dim} channels",
        downsampling=model.downsampling,
        family=config["_class_name"],
        folder=name,
        config=json.dumps(json.loads(run.config.to_json()), indent=2),
    )
    card_header.write_card(
        folder,
        card,
        run.config,
        library="diffusers",
        trained=True,
        origin="",
        license=license,
    )
