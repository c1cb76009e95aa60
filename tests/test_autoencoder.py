"""Tests of the autoencoders against published sizes, diffusers on the same weights, and SciPy."""

import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2
from scipy.spatial import cKDTree

from conprediff_jax.models import quantizer
from conprediff_jax.models.autoencoder import AutoencoderKL, DiagonalGaussian, VQModel
from conprediff_jax.weights.diffusers.autoencoder import params_from_diffusers, params_to_diffusers

TINY = {"channels": 32, "channel_mult": (1, 2), "blocks_per_level": 1}


@pytest.mark.parametrize(
    ("count", "model"),
    [
        pytest.param(55_322_782, VQModel(), id="vq-f4"),
        pytest.param(
            83_653_863,
            AutoencoderKL(channel_mult=(1, 2, 4, 4), latent_channels=4),
            id="kl-f8",
        ),
        pytest.param(
            64_009_667,  # diffusers' own count for microsoft/vq-diffusion-ithq
            VQModel(
                channels=64,
                channel_mult=(1, 2, 4, 8),
                attention_downsampling=(8,),
                latent_channels=256,
                embed_dim=128,
                num_codes=4096,
            ),
            id="ithq",
        ),
    ],
)
def test_published_parameter_counts(count, model):
    x = jnp.zeros((1, model.downsampling, model.downsampling, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables)) == count


def vq_models():
    """Attention at the lower resolution, one-channel images, latents narrower than the encoder."""
    theirs = diffusers.VQModel(
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=6,
        vq_embed_dim=4,
        num_vq_embeddings=17,
    )
    options = {"out_channels": 1, "latent_channels": 6, "embed_dim": 4, "num_codes": 17}
    return theirs, VQModel(**TINY, **options, attention_downsampling=(2,))


def kl_models():
    """Two blocks per level, and attention in the middle only."""
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
    return theirs, AutoencoderKL(**(TINY | {"blocks_per_level": 2}), latent_channels=4)


def random_state_dict(model):
    """Moves every weight, also those of norms, off its initial value, and returns all weights."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.03 * torch.randn(weight.shape, generator=generator)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def to_torch(x):
    return torch.from_numpy(np.asarray(x, np.float64).transpose(0, 3, 1, 2).copy())


def from_torch(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def assert_close(ours, theirs):
    """Compares our float32 with their float64. Their own float32 differs by about 3e-6 from it."""
    assert 0.5 < np.abs(theirs).max() < 5
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6)


def assert_round_trip(params, model, state_dict):
    back = params_to_diffusers(params, model)
    assert back.keys() == state_dict.keys()
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, state_dict[name], err_msg=name)
        assert tensor.flags.c_contiguous


def test_vq_model_matches_diffusers():
    theirs, ours = vq_models()
    with torch.no_grad():  # codes as far apart as the vectors below
        theirs.quantize.embedding.weight.normal_(generator=torch.Generator().manual_seed(1))
    state_dict = random_state_dict(theirs)
    params = params_from_diffusers(state_dict, ours)
    theirs.double()
    rng = np.random.default_rng(0)

    x = rng.normal(size=(2, 8, 12, 1)).astype(np.float32)
    z = jax.jit(lambda x: ours.apply({"params": params}, x, method="encode"))(x)
    assert_close(z, from_torch(theirs.encode(to_torch(x)).latents))

    z = jnp.array(rng.normal(size=z.shape), jnp.float32)
    z_torch = to_torch(z)
    vectors, loss, (_, _, indices) = theirs.quantize(z_torch)
    got = ours.apply({"params": params}, z, method="quantize")
    np.testing.assert_array_equal(got.indices, indices.numpy().reshape(got.indices.shape))
    assert len(np.unique(got.indices)) > 8
    np.testing.assert_allclose(got.vectors, from_torch(vectors), rtol=1e-6)
    np.testing.assert_allclose(got.loss.mean(), loss.item(), rtol=1e-6)
    looked_up = ours.apply({"params": params}, got.indices, method="lookup")
    np.testing.assert_array_equal(looked_up, got.vectors)

    for quantize in [True, False]:
        image = jax.jit(
            lambda z, q=quantize: ours.apply({"params": params}, z, quantize=q, method="decode")
        )(z)
        with torch.no_grad():
            expected = theirs.decode(z_torch, force_not_quantize=not quantize).sample
        assert_close(image, from_torch(expected))
    assert_round_trip(params, ours, state_dict)


def test_autoencoder_kl_matches_diffusers():
    theirs, ours = kl_models()
    state_dict = random_state_dict(theirs)
    params = params_from_diffusers(state_dict, ours)
    theirs.double()
    x = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
    image, posterior = jax.jit(ours.apply)({"params": params}, x)
    with torch.no_grad():
        expected = theirs.encode(to_torch(x)).latent_dist
        expected_image = theirs.decode(to_torch(posterior.mode())).sample
    assert_close(posterior.mean, from_torch(expected.mean))
    assert_close(posterior.log_variance, from_torch(expected.logvar))
    np.testing.assert_allclose(posterior.kl(), expected.kl().numpy(), rtol=1e-5)
    assert_close(image, from_torch(expected_image))
    assert_round_trip(params, ours, state_dict)


def test_accounts_for_every_tensor():
    theirs, ours = vq_models()
    state_dict = random_state_dict(theirs)
    params = params_from_diffusers(state_dict, ours)
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in state_dict.items():
        for new_part, old_part in old_names.items():
            name = name.replace(f".{new_part}.", f".{old_part}.")
        old[name] = tensor
    assert old.keys() != state_dict.keys()
    jax.tree.map(np.testing.assert_array_equal, params_from_diffusers(old, ours), params)

    codebook = "quantize.embedding.weight"
    without = {name: tensor for name, tensor in state_dict.items() if name != codebook}
    with pytest.raises(ValueError, match=r"fit the VQModel: .*weight \(17, 4\) is missing"):
        params_from_diffusers(without, ours)
    with pytest.raises(ValueError, match=r"extra \(2,\) is left over"):
        params_from_diffusers(state_dict | {"extra": np.zeros(2)}, ours)
    with pytest.raises(ValueError, match=r"weight is \(17, 5\), not \(17, 4\)"):
        params_from_diffusers(state_dict | {codebook: np.zeros((17, 5))}, ours)
    with pytest.raises(ValueError, match=r"encoder/conv/bias \(3,\) is left over"):
        extra = {"encoder": params["encoder"] | {"conv": {"bias": np.zeros(3)}}}
        params_to_diffusers(params | extra, ours)


def test_gaussian_matches_torch():
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(3, 4, 4, 2)).astype(np.float32)
    log_variance = rng.normal(size=mean.shape).astype(np.float32)
    gaussian = DiagonalGaussian(jnp.array(mean), jnp.array(log_variance))
    theirs = torch.distributions.Normal(
        torch.from_numpy(mean), torch.from_numpy(np.exp(log_variance / 2))
    )
    kl = torch.distributions.kl_divergence(theirs, torch.distributions.Normal(0.0, 1.0))
    np.testing.assert_allclose(gaussian.kl(), kl.sum(dim=(1, 2, 3)), rtol=1e-5)

    wide = DiagonalGaussian(*(jnp.tile(array[:1], (400, 1, 1, 1)) for array in gaussian))
    keys = jax.random.split(jax.random.key(0), 400)
    draws = wide.sample(keys)
    scores = (draws - mean[0]) / np.exp(log_variance[0] / 2)
    assert abs(scores.mean()) < 0.03  # 12,800 draws: three standard errors
    assert abs(scores.std() - 1) < 0.02
    half = DiagonalGaussian(*(array[200:] for array in wide))
    np.testing.assert_array_equal(half.sample(keys[200:]), draws[200:])


def test_nearest_codes_match_a_tree():
    rng = np.random.default_rng(0)
    codebook = rng.normal(size=(100, 3)).astype(np.float32)
    vectors = rng.normal(size=(2, 5, 50, 3)).astype(np.float32)
    indices = quantizer.nearest_codes(jnp.array(vectors), jnp.array(codebook))
    assert indices.dtype == jnp.int32
    np.testing.assert_array_equal(indices, cKDTree(codebook).query(vectors)[1])
    # Of equal codes the first is taken, and every code is nearest to itself.
    twice = jnp.concatenate([codebook, codebook])
    np.testing.assert_array_equal(quantizer.nearest_codes(twice, twice), np.tile(range(100), 2))


def test_quantizer_gradients():
    """Gradients pass straight through to the vectors; those of (2) equal derivatives by hand."""
    rng = np.random.default_rng(0)
    codebook = jnp.array(rng.normal(size=(8, 3)), jnp.float32)
    z = jnp.array(rng.normal(size=(2, 4, 5, 3)), jnp.float32)
    module = quantizer.VectorQuantizer(8, 3, codebook_weight=0.3, commitment_weight=0.7)

    def apply(z, codebook):
        return module.apply({"params": {"codebook": codebook}}, z)

    def decoder(vectors):  # anything whose gradient depends on where it is taken
        return jnp.sum(jnp.sin(vectors) * jnp.arange(3))

    codes = apply(z, codebook).vectors
    np.testing.assert_array_equal(codes, codebook[apply(z, codebook).indices])
    through, to_codes = jax.grad(lambda *args: decoder(apply(*args).vectors), (0, 1))(z, codebook)
    np.testing.assert_array_equal(through, jax.grad(decoder)(codes))
    np.testing.assert_array_equal(to_codes, jnp.zeros_like(codebook))

    to_z, to_codes = jax.grad(lambda *args: apply(*args).loss.sum(), (0, 1))(z, codebook)
    per_value = 2 * np.asarray(z - codes) / (4 * 5 * 3)
    np.testing.assert_allclose(to_z, 0.7 * per_value, rtol=1e-6)
    expected = np.zeros((8, 3), np.float32)
    np.add.at(expected, np.asarray(apply(z, codebook).indices), -0.3 * per_value)
    np.testing.assert_allclose(to_codes, expected, rtol=1e-5, atol=1e-8)


def test_lookup_is_nan_outside_the_codebook():
    module = quantizer.VectorQuantizer(4, 2)
    params = {"params": {"codebook": jnp.arange(8.0).reshape(4, 2)}}
    codes = module.apply(params, jnp.array([3, 4, -1]), method="lookup")
    np.testing.assert_array_equal(codes[0], [6, 7])
    assert np.isnan(codes[1:]).all()


@pytest.fixture(scope="module")
def mixture():
    """512 points around four well separated centres, as a batch of two grids."""
    rng = np.random.default_rng(0)
    centres = np.array([[0, 0], [8, 0], [0, 8], [8, 8]])
    points = centres[rng.integers(4, size=512)] + 0.3 * rng.normal(size=(512, 2))
    return jnp.array(points.reshape(2, 16, 16, 2), jnp.float32)


def follow(codebook, vectors, steps, restart_below=0.05):
    """The codebook and its averages after `steps` updates on one batch."""

    def step(carry, key):
        averages, codebook = carry
        indices = quantizer.nearest_codes(vectors, codebook)
        rngs = jax.random.split(key, len(vectors))
        return quantizer.update_codebook(
            averages, vectors, indices, rngs, decay=0.8, restart_below=restart_below
        ), indices

    keys = jax.random.split(jax.random.key(0), steps)
    start = (quantizer.init_averages(codebook), codebook)
    return jax.lax.scan(step, start, keys)[0]


def test_moving_averages_converge_to_k_means(mixture):
    start = jnp.array([[1.0, 1.0], [6.0, 1.0], [1.0, 6.0], [6.0, 6.0]])
    averages, codebook = jax.jit(follow, static_argnums=2)(start, mixture, 80)
    points = np.asarray(mixture).reshape(-1, 2)
    centroids, labels = kmeans2(points, np.asarray(start), minit="matrix")
    np.testing.assert_allclose(codebook, centroids, atol=1e-5)
    np.testing.assert_allclose(averages.usage, np.bincount(labels) / 512, atol=1e-5)


def test_dead_codes_are_revived(mixture):
    points = np.asarray(mixture).reshape(-1, 2)
    start = jnp.concatenate([jnp.array([[4.0, 4.0]]), 1e3 + jnp.arange(14.0).reshape(7, 2)])
    near = quantizer.nearest_codes(mixture, start)
    assert set(np.asarray(near).flat) == {0}
    averages, codebook = jax.jit(follow, static_argnums=2)(start, mixture, 120)
    counts = quantizer.count_codes(quantizer.nearest_codes(mixture, codebook), 8)
    assert quantizer.used_fraction(counts) == 1
    # The codes no longer move, as in k-means.
    np.testing.assert_allclose(codebook, kmeans2(points, np.asarray(codebook), 1)[0], atol=0.02)

    # One update: dead codes become different points of the batch with equal usage.
    rngs = jax.random.split(jax.random.key(1), 2)
    dying = averages._replace(usage=averages.usage.at[3:6].set(0))
    indices = jnp.zeros(mixture.shape[:-1], jnp.int32)
    revived, codebook = quantizer.update_codebook(dying, mixture, indices, rngs)
    np.testing.assert_array_equal(revived.usage[3:6], [1 / 8] * 3)
    distances, drawn = cKDTree(points).query(codebook[3:6])
    np.testing.assert_allclose(distances, 0, atol=1e-6)
    assert len(set(drawn)) == 3
    with pytest.raises(ValueError, match=r"decay=1.0 must be in \(0, 1\)"):
        quantizer.update_codebook(averages, mixture, indices, rngs, decay=1.0)


def test_codebook_metrics():
    counts = quantizer.count_codes(jnp.array([[0, 1], [3, 1]]), 6)
    np.testing.assert_array_equal(counts, [1, 2, 0, 1, 0, 0])
    assert quantizer.used_fraction(counts) == 0.5
    np.testing.assert_allclose(quantizer.perplexity(counts), 2**1.5, rtol=1e-6)  # 1.5 bits
    np.testing.assert_allclose(quantizer.perplexity(jnp.ones(6)), 6, rtol=1e-6)


def initialised(**options):
    """A one-level autoencoder with all parameters random, and an image."""
    model = VQModel(**(TINY | {"channel_mult": (1,), "num_codes": 5} | options))
    x = jax.random.uniform(jax.random.key(0), (1, 4, 4, 3), minval=-1)
    variables = jax.eval_shape(model.init, jax.random.key(1), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.array(0.2 * rng.normal(size=leaf.shape), jnp.float32), variables
    )
    return model, variables, x


def test_bfloat16_activations():
    model, variables, x = initialised(dtype=jnp.bfloat16)
    z, exact = (
        jax.jit(lambda x, m=m: m.apply(variables, x, method="encode"))(x)
        for m in [model, model.clone(dtype=jnp.float32)]
    )
    image = jax.jit(lambda z: model.apply(variables, z, method="decode"))(z)
    assert z.dtype == image.dtype == jnp.float32
    assert jnp.linalg.norm(z - exact) < 0.05 * jnp.linalg.norm(exact)


def test_remat_changes_nothing_and_dropout_acts_in_training_only():
    model, variables, x = initialised(dropout=0.3)

    @jax.jit
    def gradients(variables, rng):
        def loss(variables, model):
            z = model.apply(variables, x, train=True, rngs={"dropout": rng}, method="encode")
            return jnp.square(z).mean()

        models = [model, model.clone(remat=True)]
        return [jax.value_and_grad(loss)(variables, model) for model in models]

    plain, recomputed = gradients(variables, jax.random.key(0))
    scale = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(plain))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * scale),
        plain,
        recomputed,
    )
    still = model.apply(variables, x, method="encode")  # needs no keys
    other = gradients(variables, jax.random.key(1))[0][0]
    assert len({float(plain[0]), float(other), float(jnp.square(still).mean())}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 48}, "multiple of 32"),
        ({"channel_mult": ()}, "multiple of 32"),
        ({"attention_downsampling": (4,)}, r"downsampling=\(4,\): choose among \[1, 2\]"),
        ({"blocks_per_level": 0}, "blocks_per_level=0 must be at least 1"),
        ({"embed_dim": 0}, "embed_dim=0 must be at least 1"),
        ({"num_codes": 0}, "num_codes=0 must be at least 1"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
    ],
)
def test_refuses_contradicting_options(options, message):
    with pytest.raises(ValueError, match=message):
        VQModel(**(TINY | options))


def test_refuses_odd_images():
    with pytest.raises(ValueError, match="image of 3 x 4: both must be multiples of 2"):
        jax.eval_shape(VQModel(**TINY).init, jax.random.key(0), jnp.zeros((1, 3, 4, 3)))
