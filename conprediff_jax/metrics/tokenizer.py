"""CLIP's tokenizer: byte-pair encoding of lower-case words.

A word is a run of letters, a single digit, a run of anything else but space, or one of English's
contractions. Its bytes become symbols, the last one marked as the word's end, and pairs of symbols
are merged in the order in which the merges were learnt. Sources: Sennrich et al. 2016 (arXiv
1508.07909); Radford et al. 2021 (arXiv 2103.00020), section 2.4.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from conprediff_jax.errors import UserError

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
_CONTRACTION = re.compile("'(?:s|t|re|ve|m|ll|d)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Encodes texts.

    Attributes:
        vocabulary: number of every symbol.
        ranks: order of every merge.
        length: tokens of a text, start and end included.
    """

    vocabulary: dict[str, int]
    ranks: dict[tuple[str, str], int]
    length: int = 77

    @property
    def end(self) -> int:
        """The token that ends a text, and fills what is left."""
        return self.vocabulary[END]

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "batch length"]:
        """Tokens, int32; long texts are cut off, short ones filled up with the end."""
        tokens = np.full((len(texts), self.length), self.end, np.int32)
        tokens[:, 0] = self.vocabulary[START]
        for row, text in zip(tokens, texts, strict=True):
            words = _words(" ".join(unicodedata.normalize("NFC", text).lower().split()))
            symbols = itertools.chain.from_iterable(map(self._merge, words))
            body = [self.vocabulary[symbol] for symbol in symbols][: self.length - 2]
            row[1 : 1 + len(body)] = body
        return tokens

    def _merge(self, word: str) -> list[str]:
        """The symbols of a word."""
        symbols = [_SYMBOLS[byte] for byte in word.encode()]
        symbols[-1] += WORD_END
        while len(symbols) > 1:
            pairs = set(itertools.pairwise(symbols))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            merged, index = [], 0
            while index < len(symbols):
                both = tuple(symbols[index : index + 2]) == best
                merged.append("".join(best) if both else symbols[index])
                index += 2 if both else 1
            symbols = merged
        return symbols


def load(folder: str | os.PathLike, length: int = 77) -> Tokenizer:
    """Reads `vocab.json` and `merges.txt`.

    Raises:
        UserError: a file is missing or not what it should be.
    """
    folder = pathlib.Path(folder)
    try:
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no readable vocab.json and merges.txt: {error}") from error
    missing = [word for word in (START, END) if word not in vocabulary]
    if missing:
        raise UserError(f"{folder}/vocab.json: has no {missing[0]}: not CLIP's vocabulary")
    merges = [tuple(line.split()) for line in lines if not line.startswith("#version")]
    ranks = {pair: rank for rank, pair in enumerate(pair for pair in merges if len(pair) == 2)}
    return Tokenizer(vocabulary=vocabulary, ranks=ranks, length=length)


def _words(text: str) -> list[str]:
    """Splits a text; spaces belong to no word."""
    words, index = [], 0
    while index < len(text):
        contraction = _CONTRACTION.match(text, index)
        if contraction:
            word = contraction[0]
        else:
            kind = _kind(text[index])
            run = itertools.takewhile(lambda char: _kind(char) == kind, text[index:])  # noqa: B023
            word = text[index] if kind == "N" else "".join(run)
        if not word.isspace():
            words.append(word)
        index += len(word)
    return words


def _kind(char: str) -> str:
    """L for letters, N for digits, Z for space, P for the rest."""
    category = unicodedata.category(char)[0]
    return "Z" if char.isspace() else category if category in "LN" else "P"


def _byte_symbols() -> list[str]:
    """A printable character for every byte: its own, or one from 256 on where it has none."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = itertools.count(256)
    return [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]


_SYMBOLS = _byte_symbols()
