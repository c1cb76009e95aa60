"""The vocabulary of captions, read from a file or learnt from the data.

A learnt vocabulary is part of the run. So it is stored in the config, in `config.text.vocabulary`,
before anything is built, and every checkpoint holds it.
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

CAPTIONED = 20_000  # number of records that a vocabulary is learnt from


def with_vocabulary(config: ConfigDict) -> ConfigDict:
    """The config with the vocabulary of its captions; unchanged if it needs none or has one.

    Raises:
        ConfigError: There are no captions, or `vocab_size` is too small.
        DataError: The data are missing.
        UserError: The tokenizer's file is missing or unreadable.
    """
    text = _lacking_vocabulary(config)
    if text is None:
        return config
    if text.has_fixed_weights and not text.tokenizer:
        raise ConfigError(
            f"config.text.tokenizer is empty: the frozen encoder in {text.weights} needs the "
            "tokenizer that it was trained with; give its folder, which is often the same one"
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
    """The config with the vocabulary of the first stored config that has one, if it lacks its own.

    If a vocabulary were learnt again from data that have changed, tokens would change their
    meaning.

    Args:
        config: The config.
        stored: Configs of the runs or models that this run continues or starts from; None for one
            that does not exist.

    Raises:
        ConfigError: A key has a wrong value.
    """
    if _lacking_vocabulary(config) is None:
        return config
    for found in filter(None, stored):
        if vocabulary := found.get("text", {}).get("vocabulary"):
            return _with(config, vocabulary)
    return config


def with_any_vocabulary(config: ConfigDict) -> ConfigDict:
    """The config with a vocabulary of a single letter, for programs that are compiled but not run.

    It needs neither data nor files. The config is unchanged if it needs no vocabulary or has one.

    Raises:
        ConfigError: A key has a wrong value.
    """
    text = _lacking_vocabulary(config)
    if text is None:
        return config
    sizes = {"vocab_size": text.encoder.vocab_size, "length": text.encoder.length}
    with naming("config.text"):
        return _with(config, Tokenizer.train(["a"], **sizes).to_json())


def _lacking_vocabulary(config: ConfigDict) -> TextCondition | None:
    """The object of `config.text` if it needs a vocabulary and has none; None otherwise."""
    if config.get("task") != TASK or config.text.get("kind") == "none":
        return None
    text = make_text(config)
    return None if text.vocabulary else text


def _with(config: ConfigDict, vocabulary: str) -> ConfigDict:
    config = ConfigDict(config.copy_and_resolve_references())
    with config.unlocked():
        config.text.vocabulary = vocabulary
    return config
