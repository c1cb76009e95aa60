"""Vector quantisation: a codebook, its nearest code, its losses, and its moving averages.

With codes e_1 .. e_K and a vector z,

    k(z) = argmin_k |z - e_k|^2 = argmax_k z . e_k - |e_k|^2 / 2                      (1)
    loss = w_e mean (sg[z] - e_k)^2 + w_z mean (z - sg[e_k])^2                        (2)

where sg stops the gradient. The codes pass their gradient on to z as if they were z (straight
through). Instead of descending (2), codes may follow the mean of the vectors they stand for:

    u_k <- d u_k + (1 - d) n_k / N,   s_k <- d s_k + (1 - d) sum_{z: k(z) = k} z / N,
    e_k = s_k / u_k                                                                   (3)

over the N vectors of a batch, n_k of them nearest to e_k. A code that lost its vectors moves to one
of the batch.

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
    """What `VectorQuantizer` makes of a batch of vectors.

    Attributes:
        vectors: The nearest codes, `[batch, *grid, channels]`; their gradient goes to the input.
        indices: Which codes, `[batch, *grid]`, int32.
        loss: Equation (2), a mean over each example, `[batch]`.
    """

    vectors: Float[Array, "batch *grid channels"]
    indices: Int[Array, "batch *grid"]
    loss: Float[Array, "batch"]


def nearest_codes(
    vectors: Float[Array, "*points channels"], codebook: Codebook
) -> Int[Array, "*points"]:
    """The index (int32) of the code nearest to each vector, equation (1), the first if several are.

    One float32 matrix product; the largest array is `[*points, codes]`.
    """
    products = jnp.matmul(vectors.astype(jnp.float32), codebook.T, precision="highest")
    scores = products - jnp.square(codebook).sum(axis=-1) / 2
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


class VectorQuantizer(nn.Module):
    """Replaces vectors by the nearest of its codes, all in float32.

    The default weights are those of the published VQ-f4: 0.25 pulls codes and 1 pulls vectors.
    The paper has them the other way round (1 and beta = 0.25), and taming-transformers keeps
    the exchange as its "legacy" loss. With moving averages, equation (3), let `codebook_weight` be
    0, so that gradients leave the codes alone.

    Attributes:
        num_codes: K.
        features: Channels of a code.
        codebook_weight: w_e in (2).
        commitment_weight: w_z in (2).
    """

    num_codes: int
    features: int
    codebook_weight: float = 0.25
    commitment_weight: float = 1.0

    def setup(self):
        """Declares the codes, uniform in [-1/K, 1/K] at first."""

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
        # Adding an exact zero keeps the codes to the last bit, which z + sg[codes - z] does not.
        vectors = still_codes + (z - still_z)
        return Quantized(vectors, indices, distance.reshape(len(z), -1).mean(axis=1))

    def lookup(self, indices: Int[Array, "*points"]) -> Float[Array, "*points channels"]:
        """The codes of indices 0 .. K-1; NaN for any other, such as a mask token."""
        # Negative indices would count from the end.
        indices = jnp.where(indices < 0, self.num_codes, indices)
        return jnp.take(self.codebook, indices, axis=0, mode="fill", fill_value=jnp.nan)


class CodebookAverages(NamedTuple):
    """The moving averages of equation (3).

    Attributes:
        usage: u_k, the share of vectors that each code stands for; 1/K if all are equal.
        sums: s_k, so that the codes are `sums / usage[:, None]`.
    """

    usage: Counts
    sums: Codebook


def init_averages(codebook: Codebook) -> CodebookAverages:
    """Averages under which every code has its present value and equal usage."""
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
    """One step of equation (3), and the restart of codes that have fallen out of use.

    A restarted code becomes a vector of the batch, a different one for each such code where there
    are enough, and is given equal usage: it then has some hundred steps to find vectors of its own.

    Args:
        averages: Of the previous step, or from `init_averages`.
        vectors: What was quantised.
        indices: Their codes.
        rngs: One key per example; they choose among the vectors.
        decay: d.
        restart_below: Codes restart whose usage falls below this fraction of equal usage, 1/K.

    Returns:
        The averages, and the codebook that follows from them.

    Raises:
        ValueError: If `decay` or `restart_below` is outside (0, 1).
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
    """Vectors of the batch, drawn without replacement until there are no more."""
    flat = vectors.reshape(-1, vectors.shape[-1])
    # The winners of a draw by every vector: it depends on its example's key, not on the batch.
    points = len(flat) // len(vectors)
    draws = jax.vmap(lambda rng: jax.random.uniform(rng, (points,)))(rngs)
    _, order = jax.lax.top_k(draws.reshape(-1), min(number, len(flat)))
    return flat[jnp.resize(order, number)]


def count_codes(indices: Int[Array, "*points"], num_codes: int) -> Counts:
    """How often each code occurs, float32; counts of several batches add up."""
    return jnp.zeros(num_codes).at[indices.reshape(-1)].add(1.0)


def perplexity(counts: Counts) -> Float[Array, ""]:
    """exp of the entropy of the codes: 1 if a single one is used, K if all are, equally."""
    shares = counts / counts.sum()
    return jnp.exp(jax.scipy.special.entr(shares).sum())


def used_fraction(counts: Counts) -> Float[Array, ""]:
    """The share of codes that occur at all."""
    return (counts > 0).mean()
