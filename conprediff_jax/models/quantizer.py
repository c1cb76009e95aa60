"""Vector quantisation: the nearest code, the losses of a codebook, and its moving averages.

With codes e_1 .. e_K and a vector z,

    k(z) = argmin_k |z - e_k|^2 = argmax_k z . e_k - |e_k|^2 / 2                      (1)
    loss = w_e mean (sg[z] - e_k)^2 + w_z mean (z - sg[e_k])^2                        (2)

where sg stops the gradient. The gradient of the codes is passed to z unchanged (straight through).
Instead of being trained by (2), a code may be the moving average of the vectors it stands for:

    u_k <- d u_k + (1 - d) n_k / N,   s_k <- d s_k + (1 - d) sum_{z: k(z) = k} z / N,
    e_k = s_k / u_k                                                                   (3)

over the N vectors of a batch, of which n_k are nearest to e_k. A code that is hardly used any more
restarts from a vector of the batch.

Sources: van den Oord et al. (2017, arXiv 1711.00937), equation 3 and appendix A.1; restarts:
Dhariwal et al., "Jukebox" (2020, arXiv 2005.00341), section 3.1.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

Codebook = Float[Array, "codes channels"]
Counts = Float[Array, "codes"]


class Quantized(NamedTuple):
    """The result of `VectorQuantizer` for a batch of vectors.

    Attributes:
        vectors: The nearest codes, `[batch, *grid, channels]`. Their gradient goes to the input.
        indices: The indices of these codes, `[batch, *grid]`, int32.
        loss: Equation (2), its mean over each example, `[batch]`.
    """

    vectors: Float[Array, "batch *grid channels"]
    indices: Int[Array, "batch *grid"]
    loss: Float[Array, "batch"]


def nearest_codes(
    vectors: Float[Array, "*points channels"], codebook: Codebook
) -> Int[Array, "*points"]:
    """Returns the index (int32) of the code nearest to each vector, equation (1).

    If several codes are equally near, it is the first. The computation is one float32 matrix
    product, whose result `[*points, codes]` is the largest array.
    """
    products = jnp.matmul(vectors.astype(jnp.float32), codebook.T, precision="highest")
    scores = products - jnp.square(codebook).sum(axis=-1) / 2
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


class VectorQuantizer(nn.Module):
    """Replaces vectors by the nearest of its codes, in float32.

    The default weights are those of the published VQ-f4: 0.25 on the codes and 1 on the vectors.
    The paper exchanges the two (1 and beta = 0.25), and the "legacy" loss of taming-transformers is
    that of VQ-f4. With the moving averages of equation (3), set `codebook_weight` to 0, so that
    gradients do not change the codes.

    Attributes:
        num_codes: K, the number of codes.
        features: The number of channels of a code.
        codebook_weight: w_e in (2).
        commitment_weight: w_z in (2).
    """

    num_codes: int
    features: int
    codebook_weight: float = 0.25
    commitment_weight: float = 1.0

    def setup(self):
        """Declares the codes, which are initially uniform in [-1/K, 1/K]."""

        def initial(rng: Key[Array, ""], shape: tuple[int, int]) -> Array:
            return jax.random.uniform(rng, shape, minval=-1 / shape[0], maxval=1 / shape[0])

        shape = (self.num_codes, self.features)
        self.codebook = jnp.asarray(self.param("codebook", initial, shape))

    def __call__(self, z: Float[Array, "batch *grid channels"]) -> Quantized:
        """Quantises every vector of a batch."""
        z = z.astype(jnp.float32)
        indices = nearest_codes(z, self.codebook)
        codes = self.lookup(indices)
        still_z, still_codes = jax.lax.stop_gradient((z, codes))
        distance = self.codebook_weight * jnp.square(still_z - codes)
        distance += self.commitment_weight * jnp.square(z - still_codes)
        # The added term is exactly zero, so the codes keep all their bits; with z + sg[codes - z]
        # they would not.
        vectors = still_codes + (z - still_z)
        return Quantized(vectors, indices, distance.reshape(len(z), -1).mean(axis=1))

    def lookup(self, indices: Int[Array, "*points"]) -> Float[Array, "*points channels"]:
        """Returns the codes with indices 0 .. K-1, and NaN for others, such as a mask token."""
        # Otherwise negative indices would count from the end.
        indices = jnp.where(indices < 0, self.num_codes, indices)
        return jnp.take(self.codebook, indices, axis=0, mode="fill", fill_value=jnp.nan)


class CodebookAverages(NamedTuple):
    """The moving averages of equation (3).

    Attributes:
        usage: u_k, the share of vectors that each code stands for. Equal usage is 1/K.
        sums: s_k. The codes are `sums / usage[:, None]`.
    """

    usage: Counts
    sums: Codebook


def init_averages(codebook: Codebook) -> CodebookAverages:
    """Returns averages for which every code has its present value and equal usage."""
    usage = jnp.full(len(codebook), 1 / len(codebook), jnp.float32)
    return CodebookAverages(usage, codebook.astype(jnp.float32) * usage[:, None])


def update_codebook(
    averages: CodebookAverages,
    vectors: Float[Array, "batch *grid channels"],
    indices: Int[Array, "batch *grid"],
    rngs: Key[Array, "batch"],
    *,
    decay: float = 0.99,
    restart_below: float = 0.05,
) -> tuple[CodebookAverages, Codebook]:
    """Takes one step of equation (3), and restarts codes that are hardly used any more.

    A code that restarts becomes a vector of the batch, each code a different one if there are
    enough. It gets equal usage, and so has some hundred steps to find vectors of its own.

    Args:
        averages: The averages of the previous step, or those of `init_averages`.
        vectors: The vectors that were quantised.
        indices: The indices of their codes.
        rngs: One key per example, to draw vectors for the codes that restart.
        decay: d.
        restart_below: Codes restart if their usage falls below this fraction of equal usage, 1/K.

    Returns:
        The averages, and the codebook that they define.

    Raises:
        ValueError: `decay` or `restart_below` is outside (0, 1).
    """
    for name, value in [("decay", decay), ("restart_below", restart_below)]:
        if not 0 < value < 1:
            raise ValueError(f"{name}={value} must be in (0, 1)")
    num_codes, channels = averages.sums.shape
    flat = vectors.astype(jnp.float32).reshape(-1, channels)
    counts = count_codes(indices, num_codes)
    totals = jax.ops.segment_sum(flat, indices.reshape(-1), num_codes)
    usage = decay * averages.usage + (1 - decay) * counts / len(flat)
    sums = decay * averages.sums + (1 - decay) * totals / len(flat)

    dead = usage < restart_below / num_codes
    fresh = init_averages(_draw_vectors(vectors, rngs, num_codes))
    usage = jnp.where(dead, fresh.usage, usage)
    sums = jnp.where(dead[:, None], fresh.sums, sums)
    return CodebookAverages(usage, sums), sums / usage[:, None]


def _draw_vectors(
    vectors: Float[Array, "batch *grid channels"], rngs: Key[Array, "batch"], number: int
) -> Float[Array, "{number} channels"]:
    """Draws vectors of the batch without replacement, and repeats them if there are too few."""
    flat = vectors.reshape(-1, vectors.shape[-1])
    # Every vector draws a number with the key of its example, and the largest numbers win. So the
    # numbers do not depend on how the batch is split.
    points = len(flat) // len(vectors)
    draws = jax.vmap(lambda rng: jax.random.uniform(rng, (points,)))(rngs)
    _, order = jax.lax.top_k(draws.reshape(-1), min(number, len(flat)))
    return flat[jnp.resize(order, number)]


def count_codes(indices: Int[Array, "*points"], num_codes: int) -> Counts:
    """Counts how often each code occurs, float32. Counts of several batches can be added."""
    return jnp.zeros(num_codes).at[indices.reshape(-1)].add(1.0)


def perplexity(counts: Counts) -> Float[Array, ""]:
    """exp of the entropy of the codes: 1 if one code is used, K if all are used equally."""
    shares = counts / counts.sum()
    return jnp.exp(jax.scipy.special.entr(shares).sum())


def used_fraction(counts: Counts) -> Float[Array, ""]:
    """The share of codes that occur at least once."""
    return (counts > 0).mean()
