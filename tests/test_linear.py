"""Tests of layers with float32 gradients: Flax's own in float32, exact sums in bfloat16."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import mesh_of

from conprediff_jax import parallel
from conprediff_jax.common import linear


def draw(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def gradients(layer, variables, x, cotangent):
    """Output, and gradients of parameters and input."""
    y, pullback = jax.vjp(lambda v, x: layer.apply(v, x), variables, x)
    return y, *pullback(cotangent.astype(y.dtype))


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (linear.Dense, nn.Dense, (3, 2, 5)),
        (lambda n: linear.Conv(n, (3, 3), padding=1), lambda n: nn.Conv(n, (3, 3), padding=1),
         (2, 5, 6, 3)),
        (lambda n: linear.Conv(n, (3, 3), 2), lambda n: nn.Conv(n, (3, 3), 2), (2, 6, 7, 3)),
        (lambda n: linear.Conv(n, (3, 3), 2, padding=1),
         lambda n: nn.Conv(n, (3, 3), 2, padding=1), (2, 6, 7, 3)),
        (lambda n: linear.Conv(n, (1, 4), (1, 3), padding="VALID"),
         lambda n: nn.Conv(n, (1, 4), (1, 3), padding="VALID"), (2, 3, 9, 3)),
    ],
    ids=["dense", "conv", "strided", "centered", "rectangular"],
)  # fmt: skip
def test_in_float32_they_are_those_of_flax(ours, theirs, shape):
    ours, theirs, x = ours(4), theirs(4), draw(*shape)
    variables = theirs.init(jax.random.key(0), x)
    same = jax.tree.map(jnp.array_equal, variables, ours.init(jax.random.key(0), x))
    assert all(jax.tree.leaves(same))
    cotangent = draw(*theirs.apply(variables, x).shape)
    found, expected = (gradients(layer, variables, x, cotangent) for layer in (ours, theirs))
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


LAYERS = {
    "dense": (linear.Dense(4, dtype=jnp.bfloat16), (8, 30, 5)),
    "conv": (linear.Conv(4, (3, 3), 2, padding=1, dtype=jnp.bfloat16), (8, 9, 9, 3)),
    "embed": (linear.Embed(3, 4, dtype=jnp.bfloat16), (8, 40)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_in_bfloat16_gradients_of_parameters_are_float32_sums_over_devices(name):
    """Of products of bfloat16 numbers, which float32 holds: a tenth of a bfloat16 step off."""
    layer, shape = LAYERS[name]
    x = draw(*shape).astype(jnp.bfloat16)
    if name == "embed":
        x = jnp.arange(x.size).reshape(shape) % 3
    variables = layer.init(jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), variables)
    y = layer.apply(variables, x)
    assert y.dtype == jnp.bfloat16
    cotangent = 1 + draw(*y.shape).astype(jnp.bfloat16)

    mesh = mesh_of(8)
    divided = parallel.batch_sharding(mesh)
    whole = parallel.replicated(mesh)
    step = jax.jit(
        lambda v, x, g: gradients(layer, v, x, g)[1],
        in_shardings=(whole, divided, divided),
        out_shardings=whole,
    )
    found = step(variables, x, cotangent)

    wide = layer.clone(dtype=jnp.float32)
    exact = x if name == "embed" else x.astype(jnp.float32)
    expected = gradients(wide, variables, exact, cotangent)[1]
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=2**-12, atol=2**-12)
