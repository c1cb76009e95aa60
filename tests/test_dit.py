"""Tests of the diffusion transformer against torch and diffusers, and of its properties."""

import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from jax.sharding import PartitionSpec as Spec
from torch import nn

from conprediff_jax import parallel
from conprediff_jax.models import blocks, dit, patches
from conprediff_jax.models.dit import DiT, DiTBlock
from conprediff_jax.parallel import activations, sharding
from conprediff_jax.tasks.optimizer import decayed
from conprediff_jax.weights.diffusers import dit as diffusers_dit
from conprediff_jax.weights.diffusers.options import DiffusersError
from conprediff_jax.weights.original import dit as original

TINY = {"out_channels": 3, "width": 16, "num_layers": 3, "num_heads": 2, "patch": 2}
LABELS = {"num_classes": 5, "learned_null": True}


def inputs(model, batch=3, grid=(4, 6)):
    """Points, times, and the conditions that the model reads."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, *grid, 3)), jnp.float32)
    t = jnp.asarray([3, 500, 999][:batch], jnp.float32)
    text = label = None
    if model.text_dim is not None:
        text = jnp.asarray(rng.normal(size=(batch, 4, model.text_dim)), jnp.float32)
    if model.num_classes is not None:
        label = jnp.asarray([0, 4, 2][:batch])
    return (x, t), {"text": text, "label": label}


def random_params(model, scale=0.2):
    """Random parameters, also for those that are initially zero."""
    arguments, conditions = inputs(model)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *arguments, **conditions)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: scale * rng.normal(size=leaf.shape).astype("f4"), shapes)


def apply(model, params, *arguments, **conditions):
    program = jax.jit(model.apply, static_argnames="taps")
    return program({"params": params}, *arguments, **conditions)


# ----- the original layout, from the paper's equations


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class TorchBlock(nn.Module):
    """adaLN-zero of section 3.2, as figure 3 has it."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)

    def attention(self, x):
        batch, length, width = x.shape
        qkv = self.attn["qkv"](x).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.attn["proj"]((weights @ v).transpose(1, 2).reshape(batch, length, width))

    def forward(self, x, c):
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate[:, None] * self.attention(modulate(self.norm(x), shift, scale))
        h = self.mlp["fc1"](modulate(self.norm(x), mlp_shift, mlp_scale))
        return x + mlp_gate[:, None] * self.mlp["fc2"](nn.functional.gelu(h, approximate="tanh"))


class TorchDiT(nn.Module):
    """The published layout. With a learned variance it has twice the outputs."""

    def __init__(self, width, layers, heads, patch, channels, classes, side):
        super().__init__()
        self.patch, self.channels = patch, channels
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, patch)})
        steps = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": steps})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        self.blocks = nn.ModuleList(TorchBlock(width, heads) for _ in range(layers))
        self.final_layer = nn.ModuleDict(
            {
                "linear": nn.Linear(width, patch * patch * 2 * channels),
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
            }
        )
        self.pos_embed = nn.Parameter(torch.tensor(table(side, width), dtype=torch.float32)[None])
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)

    def forward(self, x, t, label):
        frequencies = 10000 ** (-torch.arange(128) / 128)
        angles = t[:, None] * frequencies
        c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], 1))
        c = c + self.y_embedder["embedding_table"](label)
        h = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_layer["adaLN_modulation"](c).chunk(2, 1)
        h = self.final_layer["linear"](modulate(self.norm(h), shift, scale))
        side, p = math.isqrt(h.shape[1]), self.patch
        h = h.reshape(len(h), side, side, p, p, -1)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(len(h), -1, side * p, side * p)


def table(side, width):
    """Position embeddings one by one: sin and cos of the column, then of the row."""
    frequency = [10000 ** (-k / (width / 4)) for k in range(width // 4)]
    return [
        [
            wave(place * f)
            for place in (column, row)
            for wave in (math.sin, math.cos)
            for f in frequency
        ]
        for row in range(side)
        for column in range(side)
    ]


def randomised(module, scale=0.2):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name != "pos_embed":
                weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    return module.eval()


def arrays(module):
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("patch", [1, 2])
def test_matches_the_original_layout(patch):
    """The learned variance is dropped; the null is the row behind the classes."""
    ours = DiT(**(TINY | LABELS | {"patch": patch}))
    theirs = randomised(TorchDiT(16, 3, 2, patch, 3, 5, 4 // patch))
    params = original.params_from_original(arrays(theirs), ours)
    (x, t), _ = inputs(ours, grid=(4, 4))
    with torch.no_grad():
        expected = theirs(
            torch.tensor(np.moveaxis(x, 3, 1)), torch.tensor(t), torch.tensor([0, 4, 5])
        )
    unconditional = jnp.array([False, False, True])
    got = apply(ours, params, x, t, label=jnp.array([0, 4, 1]), unconditional=unconditional)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got.output, np.moveaxis(expected.numpy(), 1, 3)[..., :3], atol=1e-4)


def test_reads_the_size_off_a_published_file_and_refuses_others():
    theirs = TorchDiT(384, 12, 6, 4, 4, 7, 2)
    fields = original.fields_from_original(arrays(theirs))
    assert fields == {**dit.SIZES["S"], "patch": 4, "num_classes": 7, "learned_null": True}

    tiny = arrays(TorchDiT(16, 3, 2, 2, 3, 5, 2))
    with pytest.raises(ValueError, match="width 16 and 3 blocks are of no published size"):
        original.fields_from_original(tiny)
    ours = DiT(**TINY, **LABELS)
    without = {name: tensor for name, tensor in tiny.items() if "2.mlp.fc1.bias" not in name}
    with pytest.raises(ValueError, match=r"blocks.2.mlp.fc1.bias \(64,\) is missing"):
        original.params_from_original(without, ours)
    transposed = tiny | {"pos_embed": tiny["pos_embed"].reshape(1, 2, 2, 16).swapaxes(1, 2)}
    transposed["pos_embed"] = transposed["pos_embed"].reshape(1, 4, 16)
    with pytest.raises(ValueError, match="pos_embed is not the fixed table"):
        original.params_from_original(transposed, ours)


# ----- diffusers


def their_model(**options):
    """A model with random weights, in which all blocks have the embeddings of the first."""
    model = randomised(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=3,
            num_layers=3,
            sample_size=4,
            patch_size=2,
            num_embeds_ada_norm=5,
            **options,
        )
    )
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


@pytest.mark.parametrize(("out_channels", "epsilon"), [(None, 1e-5), (6, 0.3)])
def test_matches_diffusers(out_channels, epsilon):
    theirs = their_model(out_channels=out_channels, norm_eps=epsilon)
    fields = diffusers_dit.fields_from_diffusers(dict(theirs.config), "there")
    ours = DiT(**fields)
    params = diffusers_dit.params_from_diffusers(arrays(theirs), ours)
    (x, t), conditions = inputs(ours, grid=(4, 4))
    with torch.no_grad():
        expected = theirs(
            torch.tensor(np.moveaxis(x, 3, 1)),
            torch.tensor(t).long(),
            torch.tensor(np.asarray(conditions["label"])),
        ).sample
    expected = np.moveaxis(expected.numpy(), 1, 3)[..., :3]
    np.testing.assert_allclose(apply(ours, params, x, t, **conditions).output, expected, atol=1e-4)

    # The original conventions give another output.
    published = ours.clone(time_endpoint=False)
    assert np.abs(apply(published, params, x, t, **conditions).output - expected).max() > 0.1
    if epsilon == 0.3:
        published = ours.clone(mlp_norm_epsilon=1e-6)
        assert np.abs(apply(published, params, x, t, **conditions).output - expected).max() > 0.1

    if out_channels is None:
        back = diffusers_dit.params_to_diffusers(params, ours)
        assert back.keys() == theirs.state_dict().keys()
        for name, tensor in theirs.state_dict().items():
            np.testing.assert_array_equal(back[name], tensor, err_msg=name)
        config = diffusers_dit.config_to_diffusers(ours, 3, 4)
        again = diffusers.DiTTransformer2DModel.from_config(config)
        assert again.config.norm_eps == 1e-5
        again.load_state_dict({name: torch.tensor(tensor) for name, tensor in back.items()})


def test_refuses_models_without_a_counterpart():
    theirs, ours = arrays(their_model()), DiT(**TINY, **LABELS)
    last = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"
    with pytest.raises(DiffusersError, match=f"{last} is not the same as in block 0"):
        diffusers_dit.params_from_diffusers(theirs | {last: theirs[last] + 1}, ours)
    with pytest.raises(DiffusersError, match="time_endpoint is False: diffusers' DiT has True"):
        diffusers_dit.config_to_diffusers(ours, 3, 4)
    with pytest.raises(DiffusersError, match="num_classes is None"):
        diffusers_dit.params_from_diffusers(theirs, DiT(**TINY))
    with pytest.raises(DiffusersError, match="norm_type"):
        diffusers_dit.fields_from_diffusers({"norm_type": "ada_norm"}, "there")


# ----- published numbers


@pytest.mark.parametrize(
    ("size", "patch", "count"),
    [
        ("S", 2, 32_865_056),
        ("S", 4, 32_920_448),
        ("S", 8, 33_142_016),
        ("B", 2, 130_315_808),
        ("L", 4, 457_988_224),
        ("XL", 2, 675_129_632 - 256 * 1152),  # published with the table of places
    ],
)
def test_published_parameter_counts(size, patch, count):
    model = DiT(out_channels=8, patch=patch, num_classes=1000, learned_null=True, **dit.SIZES[size])
    x, one = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1, jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x, one, label=one)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables)) == count


def test_position_and_time_embeddings():
    places = patches.positions(2, 3, 8)
    np.testing.assert_allclose(places.reshape(6, 8), table(3, 8)[:6], atol=1e-7)
    frequency = np.array([1, 0.01])
    expected = [*np.sin(frequency), *np.cos(frequency), 0, 0, 1, 1]  # the column comes first
    np.testing.assert_allclose(places[0, 1], expected, rtol=1e-6)

    t = jnp.array([999, 100])
    waves = dit.time_waves(t)
    np.testing.assert_allclose(waves[0, [0, 128]], [np.cos(999), np.sin(999)], atol=1e-5)
    angle = 999 * 10000 ** (-1 / 128)
    np.testing.assert_allclose(waves[0, [1, 129]], [np.cos(angle), np.sin(angle)], atol=2e-4)
    theirs = diffusers.models.embeddings.Timesteps(256, True, 1)(torch.tensor([999, 100])).numpy()
    np.testing.assert_allclose(dit.time_waves(t, endpoint=True), theirs, atol=2e-4)
    difference = np.linalg.norm(waves - theirs, axis=1) / np.linalg.norm(waves, axis=1)
    np.testing.assert_allclose(difference, [1.01, 0.13], atol=0.005)

    zero, one = dit.time_waves(jnp.array([0.0, 1.0]))  # SiT's times are not scaled
    np.testing.assert_allclose(zero @ one / 128, 0.97, atol=0.005)


def test_starts_as_published():
    model = DiT(**(TINY | LABELS | {"width": 64}), text_dim=6)
    (x, t), conditions = inputs(model)
    params = jax.jit(model.init)(jax.random.key(0), x, t, **conditions)["params"]
    blocks = params["blocks"]
    bounds = {
        "query": math.sqrt(6 / (4 * 64)),  # one of three in a matrix of 64 x 192
        "value": math.sqrt(6 / (4 * 64)),
        "out": math.sqrt(6 / (2 * 64)),
    }
    for name, bound in bounds.items():
        largest = np.abs(blocks["self_attention"][name]["kernel"]).max()
        assert 0.98 * bound < largest <= bound, name
    bound = math.sqrt(6 / (12 + 64))  # of a patch as one vector
    assert 0.95 * bound < np.abs(params["input"]["kernel"]).max() <= bound
    for name in ("time_embedding_in", "time_embedding_out"):
        assert abs(np.std(params[name]["kernel"]) - 0.02) < 1e-3
    assert np.std(blocks["self_attention"]["query"]["kernel"], axis=(1, 2)).min() > 0.05
    kernels = np.asarray(blocks["feed_forward"]["in"]["kernel"])
    assert not np.allclose(kernels[0], kernels[1])  # every block has its own

    def loss(params):
        return jnp.mean(jnp.square(apply(model, params, x, t, **conditions).output - x))

    assert not apply(model, params, x, t, **conditions).output.any()
    gradients = jax.grad(loss)(params)
    assert {
        name for name, leaf in gradients.items() if any(map(np.any, jax.tree.leaves(leaf)))
    } == {"output"}


# ----- properties


class Unrolled(DiT):
    """The same model with a loop in place of the scan."""

    def _blocks(self, x, c, text, taps):
        every = []
        for i in range(self.num_layers):
            params = jax.tree.map(lambda leaf, i=i: leaf[i], self.variables["params"]["blocks"])
            block = DiTBlock(self.num_heads, parent=None)
            every.append(block.apply({"params": params}, every[-1] if every else x, c, text))
        return every[-1], {name: every[int(name[-1]) - 1] for name in taps}


def test_scan_equals_blocks_one_by_one_and_every_one_can_be_tapped():
    model = DiT(**TINY, **LABELS, text_dim=6)
    arguments, conditions = inputs(model)
    params = random_params(model)
    conditions["taps"] = model.tap_names
    got = apply(model, params, *arguments, **conditions)
    expected = apply(Unrolled(**TINY, **LABELS, text_dim=6), params, *arguments, **conditions)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)
    shapes = {name: h.shape for name, h in got.taps.items()}
    blocks = dict.fromkeys(("block_1", "block_2", "block_3"), (3, 2, 3, 16))
    assert shapes == {**blocks, "output": (3, 4, 6, 4)}


def test_a_tap_does_not_keep_the_output_of_every_block():
    model = DiT(**TINY)
    (x, t), _ = inputs(model)
    params = random_params(model)
    program = jax.make_jaxpr(lambda p: model.apply({"params": p}, x, t, taps=("block_2",)))(params)
    (scan,) = (eqn for eqn in program.eqns if eqn.primitive.name == "scan")
    assert {variable.aval.shape for variable in scan.outvars} == {(3, 6, 16)}


def test_features_are_arranged_as_the_prediction():
    """If the last projection is the identity, the features are the prediction."""
    model = DiT(**(TINY | {"out_channels": 4}))
    (x, t), _ = inputs(model)
    params = random_params(model)
    params["output"] = {"kernel": np.eye(16, dtype="f4"), "bias": np.zeros(16, "f4")}
    output, features, _ = apply(model, params, x, t)
    np.testing.assert_array_equal(output, features)
    np.testing.assert_array_equal(patches.points_of(patches.patches_of(x, 2), 2, 3, 2), x)


def test_a_text_acts_through_cross_attention_alone_which_starts_at_zero():
    model = DiT(**TINY, text_dim=6, learned_null=True)
    (x, t), conditions = inputs(model)
    params = random_params(model)
    other = conditions | {"text": conditions["text"] + 1}
    null = conditions | {"unconditional": jnp.array([True, False, False])}

    def outputs(params):
        return [apply(model, params, x, t, **given).output for given in (conditions, other, null)]

    plain, changed, dropped = outputs(params)
    assert all(np.abs(a - b).max() > 1e-2 for a, b in zip(plain, changed, strict=True))
    assert np.abs(plain[0] - dropped[0]).max() > 1e-2
    np.testing.assert_allclose(plain[1:], dropped[1:], atol=1e-5)

    initial = jax.jit(model.init)(jax.random.key(0), x, t, **conditions)["params"]
    params["blocks"]["cross_attention"]["out"] = initial["blocks"]["cross_attention"]["out"]
    plain, changed, _ = outputs(params)
    np.testing.assert_array_equal(plain, changed)


def test_divided_over_devices_it_computes_the_same():
    """Kernels are divided by rows and by heads, and no parameter by its blocks."""
    model = DiT(**(TINY | LABELS | {"width": 64, "num_layers": 4}))
    mesh = parallel.make_mesh(parallel.MeshSpec(data=2, fsdp=2, tensor=2), jax.devices())
    with_text = {"denoiser": random_params(model.clone(text_dim=8))}
    blocks = sharding.tree_shardings(with_text, mesh)["denoiser"]["blocks"]
    assert blocks["cross_attention"]["query"]["kernel"].spec == Spec(None, "fsdp", "tensor")
    assert blocks["feed_forward"]["out"]["kernel"].spec == Spec(None, "tensor", "fsdp")
    bias = sharding.partition("denoiser/blocks/self_attention/query/bias", (32, 512), mesh)
    assert bias == Spec(None, "tensor")

    (x, t), conditions = inputs(model)
    arguments = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:1]]), (x, t, conditions))
    params = {"denoiser": random_params(model, 0.05)}
    shardings = sharding.tree_shardings(params, mesh)

    def gradient(params, x, t, conditions):
        def loss(params):
            output = model.apply({"params": params["denoiser"]}, x, t, **conditions).output
            return jnp.mean(jnp.square(output))

        return jax.grad(loss)(params)

    expected = jax.jit(gradient)(params, *arguments)
    arguments = jax.device_put(arguments, sharding.batch_sharding(mesh))
    with activations.divided_batch(mesh, 4):
        program = jax.jit(gradient, out_shardings=shardings)
        got = program(jax.device_put(params, shardings), *arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


def test_weight_decay_spares_the_biases_of_stacked_blocks():
    params = random_params(DiT(**TINY, **LABELS, text_dim=6))
    assert params["blocks"]["feed_forward"]["in"]["bias"].ndim == 2
    for path, applies in traverse_util.flatten_dict(decayed(params)).items():
        assert applies == (path[-1] != "bias"), path


@pytest.mark.parametrize("policy", blocks.REMAT_POLICIES)
def test_recomputing_changes_nothing_but_what_is_kept(policy):
    model = DiT(**TINY)
    (x, t), _ = inputs(model)
    params = random_params(model)

    def loss(params, model):
        denoised = model.apply({"params": params}, x, t, taps=("block_2",))
        return sum(jnp.mean(jnp.square(h)) for h in (denoised.output, denoised.tap("block_2")))

    again = model.clone(remat=True, remat_policy=policy)
    plain, recomputed = jax.jit(lambda p: [jax.grad(loss)(p, m) for m in (model, again)])(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, recomputed)

    def products(model):
        program = jax.jit(jax.grad(loss), static_argnums=1).lower(params, model).as_text()
        return program.count("stablehlo.dot_general")

    # The products of the seven layers of a block and two of attention, or those of attention only.
    assert products(again) - products(model) == {"nothing": 9, "products": 2}[policy]


def test_bfloat16_activations():
    model = DiT(**TINY, **LABELS, text_dim=6)
    half = model.clone(dtype=jnp.bfloat16)
    (x, t), conditions = inputs(model)
    params = random_params(model)
    exact = apply(model, params, x, t, **conditions).output
    output, features, _ = apply(half, params, x, t, **conditions)
    assert (output.dtype, features.dtype) == (jnp.float32, jnp.bfloat16)
    assert jnp.linalg.norm(output - exact) < 0.05 * jnp.linalg.norm(exact)
    shapes = jax.eval_shape(half.init, jax.random.key(0), x, t, **conditions)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_time_of_sit_runs_backwards():
    """SiT reads 1 - t for our t. Only `time_scale` and `time_shift` express this."""
    model = DiT(**TINY)
    (x, _), _ = inputs(model)
    params, t = random_params(model), jnp.array([0.0, 0.3, 1.0])
    turned = apply(model.clone(**original.SIT_TIME), params, x, t)
    np.testing.assert_allclose(turned.output, apply(model, params, x, 1 - t).output, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 18}, "width=18 must be a multiple of 4"),
        ({"num_heads": 3}, "width=16 must be a multiple of 3, num_heads"),
        ({"patch": 8}, "width=16 must be a multiple of 64, the points of a patch, as patch=8"),
        (
            {"remat_policy": "all"},
            r"remat_policy is 'all': choose one of \('nothing', 'products'\)",
        ),
    ],
)
def test_refuses_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DiT(**(TINY | options))


def test_refuses_a_grid_that_patches_do_not_fill():
    with pytest.raises(ValueError, match="grid of 4 x 5 points: both must be multiples of patch=2"):
        DiT(**TINY).init(jax.random.key(0), jnp.zeros((1, 4, 5, 3)), jnp.zeros(1))
