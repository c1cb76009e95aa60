"""Tests of text encoders against transformers and diffusers, and of their properties."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)
from safetensors.numpy import load_file, save_file
from transformers.models.t5.modeling_t5 import T5Attention

from conprediff_jax import parallel
from conprediff_jax.common.errors import UserError
from conprediff_jax.models.text import TEXT_ENCODERS, BERTText, CLIPText, T5Text, TextEncoder, t5
from conprediff_jax.weights import transformers_text as interop

LENGTH, VOCAB = 9, 50
OPTIONS = {"t5": {"length": LENGTH}}  # all else is in the configs


def published(kind, **options):
    """The reference model and its config, tiny or with the given options."""
    if kind == "clip":
        sizes = {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": VOCAB,
            "num_attention_heads": 4, "max_position_embeddings": LENGTH, "eos_token_id": VOCAB - 1,
            "bos_token_id": VOCAB - 2,
        }  # fmt: skip
        return transformers.CLIPTextModel, transformers.CLIPTextConfig(**sizes | options)
    if kind == "t5":
        sizes = {
            "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 3,
            "vocab_size": VOCAB, "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 7, "feed_forward_proj": "gated-gelu",
        }  # fmt: skip
        return transformers.T5EncoderModel, transformers.T5Config(**sizes | options)
    sizes = {
        "d_model": 16, "encoder_ffn_dim": 24, "encoder_layers": 2, "encoder_attention_heads": 2,
        "head_dim": 6, "vocab_size": VOCAB, "max_position_embeddings": LENGTH,
    }  # fmt: skip
    return LDMBertModel, LDMBertConfig(**sizes | options)


@pytest.fixture(scope="module", params=sorted(TEXT_ENCODERS))
def checkpoint(request, tmp_path_factory):
    """A kind, the folder of a published model with random weights, and the model."""
    folder = tmp_path_factory.mktemp(request.param)
    cls, config = published(request.param)
    torch.manual_seed(0)
    model = cls(config).eval()
    for parameter in model.parameters():  # such that nothing is too small to matter
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return request.param, folder, model


def some_tokens(padding=True):
    tokens = np.random.default_rng(0).integers(1, VOCAB, (3, LENGTH)).astype(np.int32)
    if padding:
        tokens[0, 5:] = tokens[1, 8:] = 0
    return tokens


def their_output(kind, model, tokens):
    ids = torch.from_numpy(tokens).long()
    mask = {"attention_mask": ids != 0} if kind == "t5" else {}
    with torch.no_grad():
        return model(input_ids=ids, **mask).last_hidden_state.numpy()


def test_encoders_equal_the_published_ones(checkpoint):
    kind, folder, model = checkpoint
    encoder, params = interop.load(folder, **OPTIONS.get(kind, {}))
    assert isinstance(encoder, TEXT_ENCODERS[kind]) and isinstance(encoder, TextEncoder)
    tokens = some_tokens()
    found = encoder.apply({"params": params}, jnp.asarray(tokens))
    assert found.shape == (3, encoder.length, encoder.width) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, their_output(kind, model, tokens), atol=2e-5)


def test_weights_round_trip_bit_for_bit(checkpoint, tmp_path):
    kind, folder, model = checkpoint
    encoder, params = interop.load(folder, **OPTIONS.get(kind, {}))
    written = interop.params_to_transformers(params, encoder)
    original = load_file(folder / "model.safetensors")
    ours = {name.removeprefix("text_model."): tensor for name, tensor in written.items()}
    left_aside = {name for name in original if name.startswith("to_logits")}
    assert ours.keys() == original.keys() - left_aside
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, original[name])
    config = interop.encoder_to_config(encoder)
    assert interop.encoder_from_config(config, **OPTIONS.get(kind, {})) == encoder

    # The reference library reads what is written here.
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = type(model).from_pretrained(tmp_path).eval()
    tokens = some_tokens()
    np.testing.assert_array_equal(
        their_output(kind, again, tokens), their_output(kind, model, tokens)
    )


def test_other_parts_and_older_files_are_read(checkpoint, tmp_path):
    kind, folder, _ = checkpoint
    expected = interop.load(folder, **OPTIONS.get(kind, {})).params
    tensors = load_file(folder / "model.safetensors")
    if kind == "clip":
        tensors = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
        tensors["text_model.embeddings.position_ids"] = np.arange(LENGTH)[None]
        tensors["vision_model.encoder.layers.0.mlp.fc1.bias"] = np.zeros(3, np.float32)
    if kind == "t5":
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].copy()
        tensors["decoder.final_layer_norm.weight"] = np.zeros(3, np.float32)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    shards = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    for number, (name, tensor) in enumerate(tensors.items()):
        shards[f"model-{number % 2 + 1}.safetensors"][name] = tensor
    for name, shard in shards.items():
        save_file(shard, tmp_path / name)
    index = {tensor: name for name, shard in shards.items() for tensor in shard}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    found = interop.load(tmp_path, **OPTIONS.get(kind, {})).params
    jax.tree.map(np.testing.assert_array_equal, found, expected)

    (tmp_path / "model.safetensors.index.json").unlink()
    torch_tensors = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    torch.save(torch_tensors, tmp_path / "pytorch_model.bin")
    found = interop.load(tmp_path, **OPTIONS.get(kind, {})).params
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("kind", "ours", "theirs"),
    [
        ("clip", {}, {}),
        ("clip", {"width": 768, "num_heads": 12, "hidden": 3072}, None),
        ("t5", {}, {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12}),
        ("bert", {}, {}),
    ],
    ids=["vit-b-32", "vit-l-14", "t5-v1_1-base", "ldmbert"],
)
def test_defaults_have_the_published_sizes(kind, ours, theirs):
    if theirs is None:
        theirs = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    cls, config = published(kind)
    if kind == "t5":
        theirs = {**theirs, "feed_forward_proj": "gated-gelu"}
    with torch.device("meta"):
        model = cls(type(config)(**theirs))
    encoder = TEXT_ENCODERS[kind](**ours)
    tree = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, encoder.length), int))
    count = sum(leaf.size for leaf in jax.tree.leaves(tree))
    counted = dict(model.named_parameters()).items()  # shared ones once
    assert count == sum(p.numel() for name, p in counted if not name.startswith("to_logits"))
    parallel.tree_shardings(tree, parallel.make_mesh(parallel.MeshSpec()))  # all have a rule


def tiny(kind, **options):
    encoder = interop.encoder_from_config(
        published(kind)[1].to_dict(), **OPTIONS.get(kind, {}) | options
    )
    tokens = jnp.zeros((1, encoder.length), int)
    return encoder, jax.jit(encoder.init)(jax.random.key(1), tokens)


@pytest.mark.parametrize(("kind", "reach"), [("clip", "after"), ("bert", "all"), ("t5", "all")])
def test_which_tokens_see_which(kind, reach):
    encoder, variables = tiny(kind)
    tokens = some_tokens(padding=False)
    other = tokens.copy()
    other[:, 4] = tokens[:, 4] % (VOCAB - 1) + 1
    encode = jax.jit(encoder.apply)
    changed = np.abs(encode(variables, tokens) - encode(variables, other)).max(axis=(0, 2)) > 0
    expected = np.arange(LENGTH) >= 4 if reach == "after" else np.full(LENGTH, True)
    np.testing.assert_array_equal(changed, expected)


def test_padding_is_hidden_in_t5_alone():
    tokens = jnp.asarray(some_tokens()[:1])
    encoder, variables = tiny("t5")
    short = encoder.clone(length=5).apply(variables, tokens[:, :5])
    np.testing.assert_allclose(encoder.apply(variables, tokens)[:, :5], short, atol=1e-5)
    encoder, variables = tiny("bert")
    other = jnp.where(tokens == 0, 3, tokens)
    moved = encoder.apply(variables, tokens) - encoder.apply(variables, other)
    assert np.abs(moved[:, :5]).max() > 1e-3


@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 7), (64, 300)])
def test_distance_buckets_are_those_of_transformers(buckets, most):
    length = 400
    distance = torch.arange(length)[None] - torch.arange(length)[:, None]
    expected = T5Attention._relative_position_bucket(distance, True, buckets, most)
    np.testing.assert_array_equal(t5.distance_buckets(length, buckets, most), expected.numpy())


@pytest.mark.parametrize("kind", sorted(TEXT_ENCODERS))
def test_each_option_changes_only_what_it_names(kind):
    encoder, variables = tiny(kind, num_layers=1)
    tokens = jnp.asarray(some_tokens())

    def gradient(encoder):
        loss = lambda v: (encoder.apply(v, tokens) ** 3).mean()  # noqa: E731
        return jax.jit(jax.grad(loss))(variables)

    plain = gradient(encoder)
    again = gradient(encoder.clone(remat=True))
    # A fusion may round differently, by about 2e-7 of a gradient's norm. The keys' bias of CLIP has
    # a gradient of zero but for rounding.
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(a) + 1e-7
    deep, of_deep = tiny(kind)
    unrolled = deep.clone(unroll=True).apply(of_deep, tokens)
    np.testing.assert_allclose(unrolled, deep.apply(of_deep, tokens), atol=1e-6)
    full = encoder.apply(variables, tokens)
    half = encoder.clone(dtype="bfloat16").apply(variables, tokens)
    assert half.dtype == jnp.float32 and 0 < np.abs(half - full).max() < 0.15
    if kind == "clip":
        unit = encoder.clone(unit=True).apply(variables, tokens)
        np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), 1, rtol=1e-5)
        np.testing.assert_allclose((unit * full).sum(-1), np.linalg.norm(full, axis=-1), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CLIPText(num_heads=7), "num_heads=7 must divide width=512"),
        (lambda: CLIPText(activation="relu"), "activation='relu' must be one of .'quick_gelu'"),
        (lambda: BERTText(head_channels=0), "head_channels=0 must be at least 1"),
        (lambda: T5Text(num_buckets=6), "num_buckets=6 must be a multiple of 4"),
        (lambda: T5Text(max_distance=8), "max_distance=8 must be above"),
        (lambda: tiny("clip")[0].apply({}, jnp.zeros((1, 3), int)), "texts of 3 tokens, but len"),
        (lambda: interop.encoder_from_config({"model_type": "vit"}), "model_type is 'vit'; a text"),
        (lambda: interop.encoder_from_config({"model_type": "t5"}), "proj is 'relu'; only 'gated"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_folder_that_does_not_fit_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no text encoder; expected config\.json"):
        interop.load(tmp_path)
    _, config = published("bert")
    config.save_pretrained(tmp_path)
    save_file({"model.layer_norm.bias": np.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"layer_norm\.bias is \(3,\), not \(16,\).* more"):
        interop.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        interop.load(tmp_path)
