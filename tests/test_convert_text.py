"""Tests of models with captions, to and from diffusers pipelines and original checkpoints.

Whole pipelines run on both sides with the same noise, from the tokenizer to the guidance.
"""

import json

import convert_originals as originals
import convert_tiny as tiny
import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from convert_pipelines import assert_same_images, randomised, theirs, to_torch
from diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion import (
    LearnedClassifierFreeSamplingEmbeddings,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)
from test_convert_original import as_torch, ldm_checkpoint, loaded, vq_diffusion_checkpoint
from vocabularies import bert_folder, clip_folder

from conprediff_jax.common.errors import UserError
from conprediff_jax.data import Tokenizer
from conprediff_jax.interop import formats
from conprediff_jax.interop.diffusers import pipeline as diffusers_pipeline
from conprediff_jax.models.text import BERTText, CLIPText
from conprediff_jax.tasks.state import TrainState
from conprediff_jax.train import start_from
from conprediff_jax.weights.original import text as original_text

pytestmark = pytest.mark.usefixtures("one_device")

PROMPTS = ["the red cat", "and the RED cat"]


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """Folders of the tokenizers of CLIP and BERT."""
    folders = {}
    for name, make in (("clip", clip_folder), ("bert", bert_folder)):
        folders[name] = tmp_path_factory.mktemp(name)
        make(folders[name])
    return folders


def made(name, vocabularies):
    """A model with random weights for a pipeline."""

    def tokenizer(kind, length):
        return Tokenizer.from_file(vocabularies[kind], length=length)

    match name:
        case "LDM":
            vocabulary = tokenizer("bert", 77)
            config = tiny.reading(tiny.eighth(), "bert", vocabulary, length=77, head_channels=8)
        case "LDM, learnt vocabulary":
            config = tiny.reading(tiny.eighth(), "bert", length=77, head_channels=8)
        case "Stable Diffusion":
            config = tiny.reading(tiny.kl(), "clip", tokenizer("clip", 12), weights="nowhere")
            config.unlock().sampling.update(spacing="trailing")
        case "VQ-Diffusion":
            config = tiny.reading(
                tiny.tokens(), "clip", tokenizer("clip", 12), "learned", "nowhere", unit=True
            )
        case "VQ-Diffusion, no null":
            config = tiny.reading(
                tiny.tokens(), "clip", tokenizer("clip", 12), "empty", "nowhere", unit=True
            )
    return tiny.pretrained(config)


NAMES = (
    *("LDM", "LDM, learnt vocabulary", "Stable Diffusion", "VQ-Diffusion"),
    "VQ-Diffusion, no null",
)


@pytest.mark.parametrize("name", NAMES)
def test_exported_models_open_in_diffusers_and_return(name, vocabularies, tmp_path, monkeypatch):
    model = made(name, vocabularies)
    formats.write(model, "diffusers", str(tmp_path / "out"))
    found, pipeline = theirs(monkeypatch, tmp_path / "out", model, 2, PROMPTS)
    assert_same_images(tiny.draw(model, 2, captions=PROMPTS), found)

    task = model.diffusion
    length = {"padding": "max_length", "max_length": task.text.encoder.length}
    tokens = task.tokenizer(PROMPTS)
    ids = pipeline.tokenizer(PROMPTS, truncation=True, return_tensors="pt", **length).input_ids
    np.testing.assert_array_equal(tokens, ids)
    encoder = pipeline.bert if name.startswith("LDM") else pipeline.text_encoder
    with torch.no_grad():
        encoded = encoder(ids)[0]
    if name.startswith("VQ"):
        encoded = encoded / encoded.norm(dim=-1, keepdim=True)
    ours = task.encode_text(model.params, model.frozen, jnp.asarray(tokens))
    np.testing.assert_allclose(ours, encoded, atol=1e-4)
    if hasattr(pipeline, "unet"):
        x = np.random.default_rng(0).normal(size=(2, *task.point_shape)).astype("f4")
        with torch.no_grad():
            output = pipeline.unet(to_torch(x), torch.tensor([3, 17]), encoded).sample
        output = output.permute(0, 2, 3, 1)
        np.testing.assert_allclose(
            tiny.apply(model, x, jnp.array([3, 17]), text=ours), output, atol=1e-4
        )

    back = diffusers_pipeline.read(str(tmp_path / "out"))
    tiny.assert_equal(back.params, model.params)
    if name.startswith("VQ"):
        tiny.assert_equal(back.frozen["text_encoder"], model.frozen["text_encoder"])
    else:
        tiny.assert_equal(back.frozen, model.frozen)
    assert back.diffusion.text.encoder == task.text.encoder
    assert back.diffusion.condition == task.condition
    assert json.loads(back.config.text.vocabulary) == json.loads(model.config.text.vocabulary)
    assert back.config.model.to_dict() == model.config.model.to_dict()


def their_text(kind, folder):
    """Text encoder and tokenizer with random weights."""
    sizes = {"vocab_size": 600, "max_position_embeddings": 12}
    if kind == "bert":
        config = LDMBertConfig(
            d_model=16, encoder_ffn_dim=24, encoder_layers=2, encoder_attention_heads=2, head_dim=8,
            **sizes | {"max_position_embeddings": 77},
        )  # fmt: skip
        return randomised(LDMBertModel(config)), bert_folder(folder)
    config = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        eos_token_id=522, **sizes,
    )  # fmt: skip
    clip_folder(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(
        folder, pad_token="!", model_max_length=12
    )
    return randomised(transformers.CLIPTextModel(config)), tokenizer


def their_unet(side, **options):
    return randomised(
        diffusers.UNet2DConditionModel(
            sample_size=side, in_channels=4, out_channels=4, block_out_channels=(32, 64),
            layers_per_block=1, cross_attention_dim=16,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **options,
        )
    )  # fmt: skip


def their_autoencoder(levels, family=diffusers.AutoencoderKL, **options):
    return randomised(
        family(
            block_out_channels=(32,) * levels, layers_per_block=1, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels, **options,
        )
    )  # fmt: skip


def their_pipeline(name, folder):
    schedule = {"num_train_timesteps": 20, "beta_schedule": "scaled_linear", "beta_start": 0.01}
    schedule |= {"beta_end": 0.2, "clip_sample": False, "set_alpha_to_one": False}
    scheduler = diffusers.DDIMScheduler(steps_offset=1, **schedule)
    encoder, tokenizer = their_text("bert" if name == "LDM" else "clip", folder)
    if name == "LDM":
        return diffusers.LDMTextToImagePipeline(
            vqvae=their_autoencoder(4), bert=encoder, tokenizer=tokenizer,
            unet=their_unet(4, attention_head_dim=2), scheduler=scheduler,
        )  # fmt: skip
    if name == "Stable Diffusion":
        return diffusers.StableDiffusionPipeline(
            vae=their_autoencoder(2, scaling_factor=0.3), text_encoder=encoder,
            tokenizer=tokenizer, unet=their_unet(4, attention_head_dim=(2, 4)),
            scheduler=scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    null = LearnedClassifierFreeSamplingEmbeddings(learnable=True, hidden_size=16, length=12)
    return diffusers.VQDiffusionPipeline(
        vqvae=their_autoencoder(2, diffusers.VQModel, num_vq_embeddings=7, vq_embed_dim=8),
        text_encoder=encoder, tokenizer=tokenizer,
        transformer=randomised(
            diffusers.Transformer2DModel(
                num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=4,
                cross_attention_dim=16, num_vector_embeds=8, num_embeds_ada_norm=5,
                attention_bias=True, activation_fn="geglu-approximate", norm_type="ada_norm",
            )
        ),
        scheduler=diffusers.VQDiffusionScheduler(8, num_train_timesteps=5),
        learned_classifier_free_sampling_embeddings=randomised(null),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["LDM", "Stable Diffusion", "VQ-Diffusion"])
def test_models_of_diffusers_are_read(name, tmp_path, monkeypatch):
    (tmp_path / "vocabulary").mkdir()
    folder = tmp_path / "theirs"
    their_pipeline(name, tmp_path / "vocabulary").save_pretrained(folder)
    if name == "VQ-Diffusion":  # which does not open again as it is saved
        index = json.loads((folder / "model_index.json").read_text())
        part = "learned_classifier_free_sampling_embeddings"
        index[part][0] = "diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion"
        (folder / "model_index.json").write_text(json.dumps(index))
    steps = 5 if name == "VQ-Diffusion" else 3
    model = diffusers_pipeline.read(str(folder)).resampled(steps=steps, guidance=2.0)
    assert model.diffusion.text.has_fixed_weights == (name != "LDM")
    found, _ = theirs(monkeypatch, folder, model, 2, PROMPTS)
    assert_same_images(tiny.draw(model, 2, captions=PROMPTS), found)


def test_parts_of_a_pipeline_must_fit(vocabularies, tmp_path):
    formats.write(made("Stable Diffusion", vocabularies), "diffusers", str(tmp_path / "out"))
    config = tmp_path / "out" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cross_attention_dim": 8}))
    with pytest.raises(UserError, match=r"cross_attention/key/kernel|to_k.weight"):
        diffusers_pipeline.read(str(tmp_path / "out"))
    index = tmp_path / "out" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "LDMPipeline"}))
    with pytest.raises(UserError, match="holds a UNet2DConditionModel in a LDMPipeline"):
        diffusers_pipeline.read(str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lambda: tiny.reading(tiny.pixels(), "bert", head_channels=8),
            "draws pixels from captions",
        ),
        (lambda: tiny.reading(tiny.eighth(), "t5", head_channels=8), "captions by T5Text"),
        (lambda: tiny.reading(tiny.eighth(), "bert", head_channels=8), "of 12 tokens: .* 77"),
        (
            lambda: tiny.reading(tiny.vq(), "bert", length=77, head_channels=8),
            "latents of 1/2 the size",
        ),
        (lambda: tiny.reading(tiny.vq(), "clip"), "StableDiffusionPipeline decodes by a KL"),
        (lambda: tiny.reading(tiny.kl(), "clip", null="learned"), "a learned null text"),
        (lambda: tiny.reading(tiny.tokens(), "clip"), "config.text.encoder.unit False"),
        (lambda: tiny.reading(tiny.kl(), "clip"), "sampling.steps_offset is 0"),
    ],
)
def test_models_without_a_pipeline_are_reported_in_one_line(config, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        formats.write(tiny.pretrained(config()), "diffusers", str(tmp_path / "out"))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


ENCODERS = {
    "bert": (BERTText, originals.OriginalBERT, {"head_channels": 64, "num_heads": 8}),
    "clip": (CLIPText, originals.OriginalCLIP, {}),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_original_text_encoders_make_the_same_output(kind):
    ours, original, options = ENCODERS[kind]
    sizes = {"vocab_size": 50, "length": 9, "width": 16, "num_layers": 3, "num_heads": 4}
    encoder = ours(**sizes | {"hidden": 64} | options)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 9)))
    params = tiny.random_like(
        jax.eval_shape(encoder.init, jax.random.key(0), tokens)["params"], seed=0
    )
    state_dict = originals.to_original(params, encoder)
    tiny.assert_equal(original_text.params_from_original(state_dict, encoder), params)
    with torch.no_grad():
        expected = loaded(original(encoder), state_dict)(torch.from_numpy(np.array(tokens))).numpy()
    np.testing.assert_allclose(encoder.apply({"params": params}, tokens), expected, atol=1e-4)


def test_an_original_checkpoint_of_latent_diffusion(vocabularies, tmp_path):
    model, path = made("LDM", vocabularies), tmp_path / "model.ckpt"
    text = originals.to_original(model.params["text_encoder"], model.diffusion.text.encoder)
    text["to_logits.weight"] = np.zeros((30, 16))
    content = ldm_checkpoint(model)
    prefixed = {f"cond_stage_model.transformer.{k}": v for k, v in text.items()}
    content["state_dict"] |= as_torch(prefixed)
    torch.save(content, path)
    config = model.config.copy_and_resolve_references().unlock()
    config.text.vocabulary = ""
    with pytest.raises(UserError, match="holds no tokenizer: give a tokenizer"):
        formats.read(str(path), "ldm", config=config)
    read = formats.read(str(path), "ldm", config=config, tokenizer=str(vocabularies["bert"]))
    tiny.assert_equal(read.params, model.params)
    assert read.config.text.vocabulary == model.config.text.vocabulary
    content["state_dict"]["cond_stage_model.transformer.stray"] = torch.zeros(2)
    torch.save(content, path)
    with pytest.raises(UserError, match=r"stray \(2,\) is left over"):
        formats.read(str(path), "ldm", config=model.config)


@pytest.mark.parametrize("null", ["learned", "empty"])
def test_an_original_checkpoint_of_vq_diffusion(null, vocabularies, tmp_path):
    """ITHQ's: CLIP is inside, and the codebook has its statistics."""
    name = "VQ-Diffusion" if null == "learned" else "VQ-Diffusion, no null"
    config = made(name, vocabularies).config.copy_and_resolve_references().unlock()
    with config.first_stage.ignore_type():
        config.first_stage.used_codes = None
    model, path = tiny.pretrained(config.lock()), tmp_path / "model.pth"
    text = originals.to_original(model.frozen["text_encoder"], model.diffusion.text.encoder)
    params = dict(model.params)
    empty = params.pop("null_text", {"embedding": np.zeros((12, 16))})["embedding"]
    content = vq_diffusion_checkpoint(
        model,
        params,
        {f"condition_emb.{name}": tensor for name, tensor in text.items()}
        | {"condition_emb.text_projection": np.zeros((16, 16)), "empty_text_embed": empty},
        {"cluster_size": np.zeros(11), "embedding_avg": np.zeros((11, 3))},
    )
    torch.save(content, path)
    config.unlock().text.vocabulary = ""
    folder = str(vocabularies["clip"])
    read = formats.read(str(path), "vq-diffusion", config=config, tokenizer=folder)
    tiny.assert_equal(read.params, model.params)
    tiny.assert_equal(read.frozen, model.frozen)
    assert read.diffusion.tokenizer.pad == 0  # "!", as in training; not the end of the text


def test_training_can_start_from_an_encoder_that_was_not_trained(vocabularies, tmp_path):
    """Trained along, it takes its place among the denoiser's parameters."""
    model = made("Stable Diffusion", vocabularies)
    formats.write(model, "inference", str(tmp_path / "out"))
    config = model.config.copy_and_resolve_references().unlock()
    config.text.weights = ""
    task = tiny.make_experiment(config).task
    params, task_state = jax.jit(task.init)()
    state = TrainState(
        step=0, params=params, ema=params["denoiser"], opt_state=(), task_state=task_state
    )
    started = start_from.start_from(str(tmp_path / "out"), state, task)
    expected = model.params | {"text_encoder": model.frozen["text_encoder"]}
    tiny.assert_equal(jax.tree.map(np.asarray, started.params["denoiser"]), expected)
    assert "text_encoder" not in started.task_state["frozen"]
