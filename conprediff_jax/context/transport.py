"""Squared 2-Wasserstein distances between many small sets of points.

Every function takes `(predicted [..., Q, C], target [..., Q, C])` and returns `[...]`: the cost of
the best coupling P of the two uniform measures (arXiv 2401.02015, section 3),

    W_2^2 = min_P  sum_jk P_jk c(y_j, t_k),      c(y, t) = |y - t|^2 / C.              (1)

Instead of the square, c may be the mean over channels of the smooth absolute value

    r^2 / 2 if |r| < 1, and |r| - 1/2 otherwise,                                        (2)

of which single values far off weigh less. Because the cost is divided by the number of channels C,
one loss weight suits both latents of 3 channels and tokens of 512. `sinkhorn` (entropic, ott-jax)
and `exact` (Hungarian, optax) differ in how they find P. Both hold P constant in the gradient, as
Danskin's theorem allows at the optimum. Both return the plain cost (1), without the entropy term of
the regularised objective, which would outweigh the cost for Q >= 16.

The layout of the arrays decides the cost on a TPU, which pads the two minor axes to 8 x 128. So the
small axes of Q x Q matrices come first: costs are `[Q, Q, problems]`, and the solver is mapped over
the last axis.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

Points = Float[Array, "*problems samples channels"]
Costs = Float[Array, "samples samples problems"]
Distances = Float[Array, "*problems"]
Transport = Callable[[Points, Points], Distances]

# The cost of one channel, by the difference of two points.
COSTS: dict[str, Callable[[Array], Array]] = {
    "squared": jnp.square,
    "smooth_l1": optax.losses.huber_loss,
}

# With at least this many channels, a matrix product is faster than an elementwise sum over them.
_MATMUL_CHANNELS = 16


def sinkhorn(
    predicted: Points,
    target: Points,
    *,
    epsilon: float = 0.05,
    iterations: int = 20,
    cost: str = "squared",
) -> Distances:
    """Entropic transport by ott-jax's Sinkhorn in log space (Cuturi 2013), in fixed time.

    Args:
        predicted: `[..., Q, C]`, of any floating dtype. The computation is in float32.
        target: `[..., Q, C]`, likewise. The distance is symmetric in the two.
        epsilon: The regularisation, relative to the mean cost of a problem. At 0.05 with 20
            iterations the value is within about 3 % of that of exact matching. A smaller epsilon
            comes closer and needs more iterations.
        iterations: The number of Sinkhorn iterations. It is fixed, so that XLA compiles a scan
            without a test of convergence, which under `vmap` is several times faster than a
            threshold.
        cost: The ground cost c, 'squared' or 'smooth_l1'.

    Returns:
        `<P, c>` of every problem, see (1), float32.
    """
    return _coupled(predicted, target, _sinkhorn_plan(epsilon, iterations), cost)


def exact(predicted: Points, target: Points, *, cost: str = "squared") -> Distances:
    """Exact matching by the Hungarian algorithm (optax), O(Q^3) for every problem.

    This is the matching that the paper takes from NWR-GAE. Shapes and dtypes are those of
    `sinkhorn`.
    """
    return _coupled(predicted, target, _matching_plan, cost)


def sinkhorn_divergence(
    predicted: Points,
    target: Points,
    *,
    epsilon: float = 0.05,
    iterations: int = 20,
    cost: str = "squared",
) -> Distances:
    """Debiased Sinkhorn: `W(y, t) - W(y, y) / 2 - W(t, t) / 2` (Feydy et al. 2019).

    An entropic plan pulls predictions towards the mean of the target; the two terms that are
    subtracted remove this bias, so that the divergence of equal sets is 0 at any epsilon. It solves
    three problems. With the plans held constant, its gradient is that of the divergence of the
    regularised objectives; its value leaves out their entropies. Arguments are those of `sinkhorn`.
    """
    plan = _sinkhorn_plan(epsilon, iterations)
    cross = _coupled(predicted, target, plan, cost)
    spread = _coupled(predicted, predicted, plan, cost) + _coupled(target, target, plan, cost)
    return cross - spread / 2


def gaussian(predicted: Points, target: Points) -> Distances:
    """The closed form for diagonal Gaussians that are fitted to both sets.

    It is `(|m_y - m_t|^2 + |s_y - s_t|^2) / C`, with m and s the mean and the standard deviation of
    every channel. This is a lower bound of (1), and needs neither iterations nor a matching. Shapes
    and dtypes are those of `sinkhorn`.
    """
    predicted, target = predicted.astype(jnp.float32), target.astype(jnp.float32)

    def moments(points: Points):
        # The added constant keeps the slope of the square root finite where all points coincide.
        return points.mean(-2), jnp.sqrt(points.var(-2) + 1e-8)

    (mean_y, std_y), (mean_t, std_t) = moments(predicted), moments(target)
    return (jnp.square(mean_y - mean_t) + jnp.square(std_y - std_t)).mean(-1)


TRANSPORTS: dict[str, Callable[..., Distances]] = {
    "sinkhorn": sinkhorn,
    "exact": exact,
    "sinkhorn_divergence": sinkhorn_divergence,
    "gaussian": gaussian,
}


def _coupled(
    predicted: Points, target: Points, plan: Callable[[Costs], Costs], cost: str
) -> Distances:
    """Returns `<P, c>`; no gradient flows through the plan P."""
    *problems, samples, channels = predicted.shape
    costs = _ground_costs(
        predicted.astype(jnp.float32).reshape(-1, samples, channels),
        target.astype(jnp.float32).reshape(-1, samples, channels),
        cost,
    )
    coupling = jax.lax.stop_gradient(plan(jax.lax.stop_gradient(costs)))
    return (coupling * costs).sum((0, 1)).reshape(problems)


def _ground_costs(
    y: Float[Array, "problems samples channels"],
    t: Float[Array, "problems samples channels"],
    cost: str,
) -> Costs:
    """The cost of every pair."""
    if cost == "squared":
        return _squared_distances(y, t)
    y, t = jnp.moveaxis(y, 0, -1), jnp.moveaxis(t, 0, -1)
    return COSTS[cost](y[:, None] - t[None]).mean(2)


def _squared_distances(
    y: Float[Array, "problems samples channels"], t: Float[Array, "problems samples channels"]
) -> Costs:
    """The squared Euclidean distance of every pair, divided by the number of channels."""
    channels = y.shape[-1]
    if channels < _MATMUL_CHANNELS:
        y, t = jnp.moveaxis(y, 0, -1), jnp.moveaxis(t, 0, -1)
        return jnp.square(y[:, None] - t[None]).mean(2)
    product = jnp.einsum("njc,nkc->jkn", y, t, precision=jax.lax.Precision.HIGHEST)
    squares_y, squares_t = jnp.square(y).sum(-1).T, jnp.square(t).sum(-1).T
    return (squares_y[:, None] + squares_t[None] - 2 * product) / channels


def _sinkhorn_plan(epsilon: float, iterations: int) -> Callable[[Costs], Costs]:
    # Only training computes this distance, and the import is half of the start of other commands.
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn as ott_sinkhorn

    solver = ott_sinkhorn.Sinkhorn(
        min_iterations=iterations,
        max_iterations=iterations,
        inner_iterations=iterations,
        threshold=-1.0,  # never met: all iterations run
    )

    def plan(cost: Float[Array, "samples samples"]) -> Float[Array, "samples samples"]:
        # The maximum avoids a division by zero where all points of a problem coincide.
        scaled = cost / jnp.maximum(cost.mean(), 1e-12)
        problem = linear_problem.LinearProblem(geometry.Geometry(scaled, epsilon=epsilon))
        return solver(problem).matrix

    return jax.vmap(plan, in_axes=-1, out_axes=-1)


@functools.partial(jax.vmap, in_axes=-1, out_axes=-1)
def _matching_plan(cost: Float[Array, "samples samples"]) -> Float[Array, "samples samples"]:
    rows, columns = optax.assignment.hungarian_algorithm(cost)
    return jnp.zeros_like(cost).at[rows, columns].set(1 / len(cost))
