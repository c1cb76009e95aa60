"""Tests of the token transformer against published sizes and diffusers, and of its properties."""

import functools
import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from conprediff_jax.models.transformer import TokenTransformer
from conprediff_jax.weights.diffusers.transformer import params_from_diffusers, params_to_diffusers

TINY = {
    "num_codes": 11,
    "grid": (4, 4),
    "width": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_steps": 10,
}
CONDITIONS = {"text_dim": 6, "num_classes": 3}


def inputs(model, batch=3):
    """Tokens and masks, times, and the conditions that the model reads."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, model.num_codes + 1, (batch, *model.grid)), jnp.int32)
    t = jnp.asarray(rng.permutation(model.num_steps)[:batch], jnp.int32)
    text = label = None
    if model.text_dim is not None:
        text = jnp.asarray(rng.normal(size=(batch, 5, model.text_dim)), jnp.float32)
    if model.num_classes is not None:
        label = jnp.arange(batch) % model.num_classes
    return (x, t), {"text": text, "label": label}


def initialised(**options):
    """A tiny model, large random parameters, and inputs."""
    model = TokenTransformer(**(TINY | options))
    arguments, conditions = inputs(model)
    params = jax.eval_shape(model.init, jax.random.key(0), *arguments, **conditions)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype("f4"), params)
    return model, params, arguments, conditions


@pytest.mark.parametrize(
    ("count", "options"),
    [
        pytest.param(
            1_359_274_624,
            {"num_codes": 4096, "width": 1408, "num_layers": 36, "text_dim": 512},
            id="ithq",
        ),
        pytest.param(
            388_780_871,
            {"num_codes": 2887, "width": 1024, "num_layers": 19, "text_dim": 512},
            id="coco",
        ),
        pytest.param(
            411_185_664,
            {"num_codes": 1024, "width": 512, "num_layers": 20, "convolutional": True},
            id="ffhq",
        ),
    ],
)
def test_published_parameter_counts(count, options):
    """ITHQ's is that of the published weights, the others those of the published configurations.

    FFHQ's has tables of 32 rows and columns for its grid of 16 x 16.
    """
    model = TokenTransformer(grid=(32, 32), num_heads=16, **options)
    arguments, conditions = inputs(model, 1)
    variables = jax.eval_shape(model.init, jax.random.key(0), *arguments, **conditions)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables)) == count


def random_diffusers(text_dim):
    """Their transformer with all weights off their initial values, and its state dict."""
    theirs = diffusers.Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=text_dim,
        attention_bias=True,
        sample_size=4,
        num_vector_embeds=12,
        activation_fn="geglu-approximate",
        num_embeds_ada_norm=10,
        norm_type="ada_norm",
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return theirs, {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}


@pytest.mark.parametrize("text_dim", [None, 6])
def test_matches_diffusers(text_dim):
    """diffusers takes one time per call, so it gets one example per call; ours get all at once."""
    theirs, state_dict = random_diffusers(text_dim)
    ours = TokenTransformer(**TINY, text_dim=text_dim)
    params = params_from_diffusers(state_dict, ours)
    (x, t), conditions = inputs(ours)
    got = jax.jit(ours.apply)({"params": params}, x, t, **conditions)

    features = []
    theirs.norm_out.register_forward_hook(lambda module, args, output: features.append(output))
    text = None if text_dim is None else torch.from_numpy(np.array(conditions["text"]))
    log_p = jax.nn.log_softmax(got.output)
    for i in range(len(x)):
        with torch.no_grad():
            expected = theirs(
                torch.from_numpy(np.array(x[i : i + 1]).reshape(1, -1)).long(),
                encoder_hidden_states=None if text is None else text[i : i + 1],
                timestep=torch.tensor(int(t[i])),
            ).sample
        expected = expected[0].T.numpy().reshape(4, 4, 11)
        np.testing.assert_allclose(log_p[i], expected, rtol=0, atol=2.4e-6)
        np.testing.assert_allclose(
            got.features[i].reshape(16, 16), features[i][0].numpy(), rtol=0, atol=5e-6
        )

    back = params_to_diffusers(params, ours)
    assert back.keys() == state_dict.keys()
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, state_dict[name], err_msg=name)


def test_accounts_for_every_tensor():
    _, state_dict = random_diffusers(None)
    ours = TokenTransformer(**TINY)
    without = {name: tensor for name, tensor in state_dict.items() if name != "out.bias"}
    with pytest.raises(ValueError, match=r"out.bias \(11,\) is missing"):
        params_from_diffusers(without, ours)
    with pytest.raises(ValueError, match=r"extra \(2,\) is left over"):
        params_from_diffusers(state_dict | {"extra": np.zeros(2)}, ours)
    for option in ({"convolutional": True}, {"num_classes": 3}):
        with pytest.raises(
            ValueError,
            match=f"{next(iter(option))} is .*: diffusers has no token transformer with it",
        ):
            params_from_diffusers(state_dict, ours.clone(**option))


def test_time_text_and_label_each_matter_and_examples_do_not_mix():
    model, params, (x, t), conditions = initialised(**CONDITIONS, convolutional=True)
    apply = jax.jit(model.apply)
    output, features, _ = apply(params, x, t, **conditions)
    assert output.shape == (3, 4, 4, 11) and features.shape == (3, 4, 4, 16)
    changes = [
        ((x, (t + 1) % 10), conditions),
        ((x, t), conditions | {"text": conditions["text"] + 1}),
        ((x, t), conditions | {"label": (conditions["label"] + 1) % 3}),
        ((x.at[0, 0, 0].set(x[0, 0, 0] - 1), t), conditions),
    ]
    for arguments, changed in changes:
        assert not np.allclose(apply(params, *arguments, **changed).output[0], output[0], atol=1e-3)
    np.testing.assert_allclose(  # the last change was to the first example only
        apply(params, *arguments, **changed).output[1:], output[1:], atol=1e-5
    )


def test_bfloat16_activations():
    model, params, arguments, conditions = initialised(text_dim=6)
    half = model.clone(dtype=jnp.bfloat16)
    exact = jax.jit(model.apply)(params, *arguments, **conditions).output
    output, features, _ = jax.jit(half.apply)(params, *arguments, **conditions)
    assert (output.dtype, features.dtype) == (jnp.float32, jnp.bfloat16)
    assert jnp.linalg.norm(output - exact) < 0.05 * jnp.linalg.norm(exact)
    variables = jax.eval_shape(half.init, jax.random.key(0), *arguments, **conditions)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_how_blocks_run_changes_nothing_and_dropout_acts_in_training_only():
    model, params, arguments, conditions = initialised(dropout=0.3, num_classes=3)

    @jax.jit
    def gradients(params):
        def loss(params, model):
            rngs = {"dropout": jax.random.key(5)}
            output = model.apply(params, *arguments, **conditions, train=True, rngs=rngs).output
            return jnp.mean(jnp.square(output))

        others = {"remat": True}, {"remat": True, "remat_policy": "products"}, {"unroll": True}
        return [jax.value_and_grad(loss)(params, model.clone(**it)) for it in ({}, *others)]

    plain, *others = gradients(params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    for other in others:
        jax.tree.map(close, plain, other)
    # There is no random stream, so nothing is dropped.
    still = jax.jit(model.apply)(params, *arguments, **conditions).output
    assert abs(np.mean(np.square(still)) - plain[0]) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_codes": 0}, "num_codes=0 must be at least 1"),
        ({"num_heads": 3}, "num_heads=3 must divide width=16"),
        ({"grid": (4,)}, r"grid=\(4,\) must be a height and a width"),
        ({"text_dim": 0}, "text_dim=0 must be None or at least 1"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
    ],
)
def test_refuses_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        TokenTransformer(**(TINY | options))


@pytest.mark.parametrize(
    ("options", "shape", "condition", "message"),
    [
        ({}, (1, 4, 5), {}, r"grid of \(4, 5\) tokens, but the model has \(4, 4\)"),
        ({"num_classes": 2}, (1, 4, 4), {}, "label is missing, but the model has num_classes=2"),
        ({}, (1, 4, 4), {"text": jnp.zeros((1, 2, 5))}, "text is given"),
        ({"text_dim": 4}, (1, 4, 4), {"text": jnp.zeros((1, 2, 5))}, "text of 5 channels"),
    ],
)
def test_refuses_inputs_that_do_not_fit(options, shape, condition, message):
    model = TokenTransformer(**(TINY | options))
    x, t = jnp.zeros(shape, jnp.int32), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match=message):
        model.init(jax.random.key(0), x, t, **condition)
