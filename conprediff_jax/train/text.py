"""Captions as a condition: tokenizer and text encoder, taken from files or trained along.

A vocabulary that is learnt is part of the run, so it is put into the config before anything is
built, `config.text.vocabulary`, and every checkpoint carries it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from conprediff_jax import data
from conprediff_jax.config import build, naming
from conprediff_jax.data import DataSpec, Tokenizer
from conprediff_jax.errors import ConfigError, UserError
from conprediff_jax.interop import transformers_text
from conprediff_jax.models.text import TEXT_ENCODERS
from conprediff_jax.train.checkpoint import newest_config
from conprediff_jax.train.frozen import differing_fields

CAPTIONED = 20_000  # records that a vocabulary is learnt from

TokenIds = Int[Array, "batch length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextCondition:
    """The `text` section of a model that reads captions.

    Attributes:
        encoder: the text encoder.
        weights: folder of a `transformers` checkpoint whose weights it has, frozen; empty for an
            encoder that is trained along with the denoiser.
        tokenizer: file or folder, see `Tokenizer.from_file`; empty for a vocabulary of at most
            `encoder.vocab_size` that is learnt from the captions.
        vocabulary: text of the tokenizer's JSON; filled in when a run begins.
        prompts: of the sample grids, in turn.

    Raises:
        ValueError: vocabulary and encoder do not fit each other.
    """

    encoder: nn.Module
    weights: str = ""
    tokenizer: str = ""
    vocabulary: str = ""
    prompts: tuple[str, ...] = ("",)

    def __post_init__(self):
        if not self.prompts:
            raise ValueError("prompts are (): give at least one, for the sample grids")
        if not self.vocabulary:
            return
        for name in ("length", "vocab_size"):
            theirs, ours = getattr(self.tokenize, name), getattr(self.encoder, name)
            if theirs > ours or (name == "length" and theirs != ours):
                raise ValueError(f"the tokenizer's {name} is {theirs}, the encoder's {ours}")

    @property
    def frozen(self) -> bool:
        """Whether the encoder keeps its weights."""
        return bool(self.weights)

    @functools.cached_property
    def tokenize(self) -> Tokenizer:
        """From captions to token ids."""
        return Tokenizer.from_json(self.vocabulary)

    def in_turn(self, num: int, captions: Sequence[str] = ()) -> list[str]:
        """So many captions: the given ones, or else `prompts`, over and over."""
        return list(itertools.islice(itertools.cycle(captions or self.prompts), num))

    @property
    def empty(self) -> Int[Array, "1 length"]:
        """Token ids of the empty caption."""
        return jnp.asarray(self.tokenize([""]))

    def init(self, rng: Array) -> Any:
        """Initial parameters of the encoder."""
        return self.encoder.init(rng, jnp.zeros((1, self.encoder.length), jnp.int32))["params"]

    def load(self) -> Any:
        """The encoder's parameters from the folder that `weights` names.

        Raises:
            UserError: they are missing, or of another encoder.
        """
        loaded = transformers_text.load(self.weights)
        ours = jax.eval_shape(self.init, jax.random.key(0))
        if jax.tree.map(jnp.shape, loaded.params) != jax.tree.map(jnp.shape, ours):
            raise UserError(
                f"config.text.weights is {self.weights}, of other sizes than config.text.encoder: "
                f"{differing_fields(loaded.encoder, self.encoder)}"
            )
        return loaded.params

    def encode(self, params: Any, tokens: TokenIds) -> Float[Array, "batch length width"]:
        """What cross-attention reads, float32."""
        return self.encoder.apply({"params": params}, tokens)


def make_text(config: ConfigDict) -> TextCondition | None:
    """The object of `config.text`; None where its kind is 'none'.

    Raises:
        ConfigError: a key does not fit.
    """
    kinds = ("none", *TEXT_ENCODERS)
    kind = config.text.get("kind")
    with naming("config.text"):
        if kind not in kinds:
            raise ValueError(f"kind is {kind!r}: choose one of {kinds}")
        if kind == "none":
            return None
        if "encoder" not in config.text:
            raise ValueError(
                f"kind is {kind!r}, and there is no key 'encoder': the config file has to say "
                f"config.text = conprediff_jax.config.text({kind!r}, ...)"
            )
    encoder = build(TEXT_ENCODERS[kind], config, "text.encoder", dtype=config.dtype)
    return build(TextCondition, config, "text", others=("kind", "encoder"), encoder=encoder)


def with_vocabulary(config: ConfigDict) -> ConfigDict:
    """The config with the vocabulary of its captions; the same one where there is nothing to do.

    Raises:
        ConfigError: there are no captions, or too small a vocabulary.
        DataError: the data are missing.
        UserError: the tokenizer's file is missing or unreadable.
    """
    text = _lacking_vocabulary(config)
    if text is None:
        return config
    if text.frozen and not text.tokenizer:
        raise ConfigError(
            f"config.text.tokenizer is empty: the frozen encoder of {text.weights} reads tokens as "
            "it was trained on; name their folder, often the same one"
        )
    spec = build(DataSpec, config, "data").of_images()
    with naming("config.data"):
        captions = list(data.captions(spec, limit=CAPTIONED))
    length = text.encoder.length
    if text.tokenizer:
        tokenizer = Tokenizer.from_file(text.tokenizer, length=length)
    else:
        with naming("config.text"):
            tokenizer = Tokenizer.train(captions, vocab_size=text.encoder.vocab_size, length=length)
    report = tokenizer.report(captions)
    logging.info(
        "captions: %d, of %.1f tokens; %d are cut off at %d, %d tokens of %d are unknown",
        report.texts, report.tokens / report.texts, report.truncated, length, report.unknown,
        report.tokens,
    )  # fmt: skip
    return _with(config, tokenizer.to_json())


def with_stored_vocabulary(config: ConfigDict, workdir: str) -> ConfigDict:
    """The config with the vocabulary of the run or model that it goes on from, where it has none.

    To learn it anew from data that have changed would give every token another meaning.

    Raises:
        ConfigError: a key does not fit.
    """
    if _lacking_vocabulary(config) is None:
        return config
    for path in filter(None, (workdir, config.train.init_from)):
        stored = newest_config(path) or {}
        if vocabulary := stored.get("text", {}).get("vocabulary"):
            return _with(config, vocabulary)
    return config


def with_any_vocabulary(config: ConfigDict) -> ConfigDict:
    """The same without data or files, for programs that are compiled and never run.

    Where a run would read or learn a vocabulary, this one knows a single letter.

    Raises:
        ConfigError: a key does not fit.
    """
    text = _lacking_vocabulary(config)
    if text is None:
        return config
    sizes = {"vocab_size": text.encoder.vocab_size, "length": text.encoder.length}
    with naming("config.text"):
        return _with(config, Tokenizer.train(["a"], **sizes).to_json())


def _lacking_vocabulary(config: ConfigDict) -> TextCondition | None:
    """The object of `config.text` where it reads captions and does not know yet by which tokens."""
    if config.get("task") != "denoising" or config.text.get("kind") == "none":
        return None
    text = make_text(config)
    return None if text.vocabulary else text


def _with(config: ConfigDict, vocabulary: str) -> ConfigDict:
    config = ConfigDict(config.copy_and_resolve_references())
    with config.unlocked():
        config.text.vocabulary = vocabulary
    return config
