"""The denoising loss on images that were not trained on, for every time of the process.

For discrete models, the losses at all times add up to a bound on the negative log-likelihood,

    -log p(x_0) <= KL(q(x_T | x_0) || p(x_T)) + sum_{t > 0} L_t + L_0                     (1)

in nats per token, without an auxiliary loss. For a process of T steps, the mean of the losses T L_t
is this sum. In continuous time, the sum is an integral, and the mean over evenly spaced times is an
estimate of it. Source: Austin et al. 2021, "Structured Denoising Diffusion Models in Discrete
State-Spaces" (arXiv 2107.03006), eq. (1).
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Real

from conprediff_jax import parallel
from conprediff_jax.common import random
from conprediff_jax.diffusion.tokens import TokenProcess
from conprediff_jax.parallel import share
from conprediff_jax.sampling.model import DiffusionModel

LossOfBatch = Callable[..., Float[np.ndarray, "batch times"]]


def make_losses(model: DiffusionModel, mesh: Mesh, times: Real[np.ndarray, "times"]) -> LossOfBatch:
    """A jitted `(params, frozen, batch, first) -> losses [batch, times]`, float32.

    The noise of an image depends only on the time and on the image's place in the data, so all
    models see the same noise. `first` is the place of the first image of the batch.

    Args:
        model: The model.
        mesh: The devices; parameters are replicated on them.
        times: Times at which the losses are computed; see `Process.evaluated_times`.
    """
    process = model.process
    if isinstance(process, TokenProcess):
        process = process.as_bound()

    def losses(params, frozen, batch, first):
        x_0 = model.first_stage.encode(frozen, batch["image"])
        keys = random.example_keys(random.stream(0, "held out"), first + jnp.arange(len(x_0)))
        label = batch["label"] if model.num_classes else None
        condition = model.encode_condition(params, frozen, label=label, tokens=batch.get("text"))

        def at(t):
            bits = jax.lax.bitcast_convert_type(t, jnp.uint32)  # of an int32, the number itself
            rngs = jax.vmap(lambda key: jax.random.fold_in(key, bits))(keys)
            t = jnp.full(len(x_0), t)
            x_t, noise = process.corrupt(rngs, x_0, t)
            output = model.predict(params, x_t, t, condition)
            return process.loss(output, x_0, x_t, noise, t)

        return jax.lax.map(at, jnp.asarray(times)).T

    return jax.jit(losses, out_shardings=parallel.replicated(mesh))


def losses_of(
    losses: LossOfBatch, params: Any, frozen: Any, batches: Iterator[dict], num: int
) -> Iterator[Float[np.ndarray, "batch times"]]:
    """The losses of the first `num` images that can be decoded, batch by batch.

    Images that cannot be decoded keep their places, so they do not change the noise of others.
    Several processes compute a batch each at a time, and all of them get the losses of all batches.

    Args:
        losses: A function from `make_losses`.
        params: See `DiffusionModel`.
        frozen: See `DiffusionModel`.
        batches: The batches of this process from `data.evaluation_iterator`.
        num: Number of images.
    """
    done = 0
    for turn, batch in enumerate(batches):
        number = turn * jax.process_count() + jax.process_index()
        arrays = {key: batch[key] for key in ("image", "label", "text") if key in batch}
        found = losses(params, frozen, arrays, number * len(batch["mask"]))
        for part in share.of_all(np.asarray(found)[batch["mask"]]):
            yield part[: num - done]
            done += len(part)
            if done >= num:
                return


def bits_per_token(
    process: TokenProcess, losses: Float[np.ndarray, "images times"]
) -> Float[np.ndarray, "images"]:
    """The bound (1) of every image in bits per token, from its losses at evenly spaced times."""
    return (losses.mean(axis=1) + process.prior_divergence) / np.log(2)
