"""Tests of tapped features: which there are, where gradients flow, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from conprediff_jax.models.denoiser import OUTPUT, check_taps
from conprediff_jax.models.dit import DiT
from conprediff_jax.models.transformer import TokenTransformer
from conprediff_jax.models.unet import UNet

UNET = UNet(out_channels=3, channels=32, channel_mult=(1, 2), blocks_per_level=1, head_channels=16)
TOKENS = TokenTransformer(num_codes=7, grid=(4, 4), width=8, num_layers=3, num_heads=2)
DIT = DiT(out_channels=3, width=16, num_layers=3, num_heads=2, patch=2)


def arguments(model):
    x = jnp.arange(16).reshape(1, 4, 4) % 7 if model.discrete else jnp.ones((1, 4, 4, 3))
    return x, jnp.array([3])


def random_params(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *arguments(model))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype("f4"), shapes)


def tapped(model, params, name):
    return model.apply({"params": params}, *arguments(model), taps=(name,)).tap(name)


def reached(model, name):
    """The parameters that a gradient from a tap reaches; stacked blocks one by one."""

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: jnp.square(tapped(model, p, name)).mean())(params)

    names = set()
    for path, leaf in traverse_util.flatten_dict(gradient(random_params(model))).items():
        rows = enumerate(leaf) if path[0] == "blocks" else [(None, leaf)]
        names |= {f"block_{i}" if i is not None else path[0] for i, row in rows if row.any()}
    return names


@pytest.mark.parametrize(
    ("model", "name", "inside", "beyond"),
    [
        (UNET, "down_0", {"input_conv", "down_0_block_0"}, {"down_0_resample"}),
        (UNET, "middle", {"down_1_block_0", "middle_block_1"}, {"up_1_block_0"}),
        (UNET, "up_0_in", {"middle_block_0", "up_1_block_1"}, {"up_0_block_0"}),
        (UNET, "up_0", {"middle_block_0", "up_0_block_1"}, {"output_norm"}),
        (TOKENS, "block_2", {"token_embedding", "block_0", "block_1"}, {"block_2"}),
        (DIT, "block_2", {"input", "block_0", "block_1"}, {"block_2", "output_modulation"}),
    ],
)
def test_gradients_flow_into_what_made_the_tap_and_no_further(model, name, inside, beyond):
    names = reached(model, name)
    assert inside <= names
    assert not (beyond | {"output", "output_conv"}) & names


@pytest.mark.parametrize("model", [UNET, TOKENS, DIT], ids=lambda model: type(model).__name__)
def test_every_tap_is_there_and_none_changes_parameters_or_other_outputs(model):
    def program(**taps):
        return lambda p: model.apply({"params": p}, *arguments(model), **taps)

    def init(**taps):
        return jax.eval_shape(
            lambda: model.init(jax.random.key(0), *arguments(model), **taps)["params"]
        )

    params = random_params(model)
    every = jax.eval_shape(program(taps=model.tap_names), params)
    assert set(every.taps) == set(model.tap_names) and model.tap_names[-1] == OUTPUT
    assert all(h.ndim == 4 and len(h) == 1 for h in every.taps.values())
    assert init() == init(taps=model.tap_names)
    # Of the same shapes of intermediate arrays, and no more of them.
    plain = str(jax.make_jaxpr(program())(params))
    assert plain == str(jax.make_jaxpr(program(taps=()))(params))
    if model is UNET:  # where taps are outputs of the same program, without a further operation
        equations = str(jax.make_jaxpr(program(taps=model.tap_names))(params)).count("\n")
        assert equations == plain.count("\n")


def test_grids_of_the_taps_of_a_unet():
    shapes = jax.eval_shape(
        lambda p: UNET.apply({"params": p}, *arguments(UNET), taps=UNET.tap_names),
        random_params(UNET),
    ).taps
    assert {name: h.shape[1:] for name, h in shapes.items()} == {
        **{"down_0": (4, 4, 32), "down_1": (2, 2, 64), "middle": (2, 2, 64), "up_1": (2, 2, 64)},
        **{"up_0_in": (4, 4, 64), "up_0": (4, 4, 32), "output": (4, 4, 32)},
    }
    assert tuple(UNET.tap_names) == (
        *("down_0", "down_1", "middle", "up_1", "up_0_in", "up_0", "output"),
    )


def test_a_wrong_tap_is_named_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"tap is 'midle': did you mean 'middle'\? .*up_0_in"):
        check_taps(UNET, ("output", "midle"))
