"""Captions as a condition: tokenizer and text encoder, taken from files or trained along.

A vocabulary that is learnt is part of the run, so it is put into the config before anything is
built, `config.text.vocabulary`, and every checkpoint carries it.
"""

from collections.abc import Iterable

from absl import logging
from ml_collections import ConfigDict

from conprediff_jax import data
from conprediff_jax.common.errors import ConfigError
from conprediff_jax.config.denoising import TASK, make_text
from conprediff_jax.config.sections import build, naming
from conprediff_jax.data import DataSpec, Tokenizer
from conprediff_jax.sampling.text import TextCondition

CAPTIONED = 20_000  # records that a vocabulary is learnt from


def with_vocabulary(config: ConfigDict) -> ConfigDict:
    """The config with the vocabulary of its captions; the same one where there is nothing to do.

    Raises:
        ConfigError: There are no captions, or too small a vocabulary.
        DataError: The data are missing.
        UserError: The tokenizer's file is missing or unreadable.
    """
    text = _lacking_vocabulary(config)
    if text is None:
        return config
    if text.has_fixed_weights and not text.tokenizer:
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


def with_vocabulary_of(config: ConfigDict, stored: Iterable[dict | None]) -> ConfigDict:
    """The config with the vocabulary of the first of some stored configs, where it has none.

    A vocabulary that is learnt anew, from data that have changed, would give every token another
    meaning.

    Args:
        config: The config.
        stored: Configs of the run or model that this one goes on from; None for one that is not.

    Raises:
        ConfigError: A key does not fit.
    """
    if _lacking_vocabulary(config) is None:
        return config
    for found in filter(None, stored):
        if vocabulary := found.get("text", {}).get("vocabulary"):
            return _with(config, vocabulary)
    return config


def with_any_vocabulary(config: ConfigDict) -> ConfigDict:
    """The same without data or files, for programs that are compiled and never run.

    Where a run would read or learn a vocabulary, this one knows a single letter.

    Raises:
        ConfigError: A key does not fit.
    """
    text = _lacking_vocabulary(config)
    if text is None:
        return config
    sizes = {"vocab_size": text.encoder.vocab_size, "length": text.encoder.length}
    with naming("config.text"):
        return _with(config, Tokenizer.train(["a"], **sizes).to_json())


def _lacking_vocabulary(config: ConfigDict) -> TextCondition | None:
    """The object of `config.text` where it reads captions and does not know yet by which tokens."""
    if config.get("task") != TASK or config.text.get("kind") == "none":
        return None
    text = make_text(config)
    return None if text.vocabulary else text


def _with(config: ConfigDict, vocabulary: str) -> ConfigDict:
    config = ConfigDict(config.copy_and_resolve_references())
    with config.unlocked():
        config.text.vocabulary = vocabulary
    return config
