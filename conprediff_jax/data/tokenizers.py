"""Tokenizers, which turn captions into the token ids that a text encoder reads.

The library `tokenizers` does the work. This module puts its parts together to the tokenizers of
CLIP, BERT and T5, learns a small vocabulary from the captions of a data set, and explains why a
prompt does not fit. A tokenizer is wholly described by the text of its `tokenizer.json`, length and
padding included, so that a checkpoint can store it.

Sources: byte-pair encoding, Sennrich et al. 2016 (arXiv 1508.07909); word pieces, Schuster and
Nakajima 2012; CLIP's pieces, Radford et al. 2021 (arXiv 2103.00020), section 2.4.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
import textwrap
import unicodedata
from collections.abc import Iterable

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from conprediff_jax.common import hub
from conprediff_jax.common.errors import UserError
from conprediff_jax.data.text_files import read_lines

# The special tokens of a vocabulary that is learnt here: padding, unknown, start and end.
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[START]", "[END]")

_CLIP_START, _CLIP_END = "<|startoftext|>", "<|endoftext|>"
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")

# The names of the files of a tokenizer.
_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt")

# The padding token of a vocabulary whose files name none is the first of these that it has.
_PADS = ("[PAD]", "<pad>", _CLIP_END)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """How well texts fit a tokenizer.

    Attributes:
        texts: Number of texts.
        truncated: Number of texts that are cut off at the end.
        tokens: Number of their tokens, special ones included, without tokens that are cut off.
        unknown: Number of tokens that stand for pieces of text that the vocabulary lacks.
    """

    texts: int
    truncated: int
    tokens: int
    unknown: int


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Turns texts into token ids, all of one length.

    Attributes:
        backend: The tokenizer of the library, with truncation and padding to one length.
    """

    backend: tokenizers.Tokenizer

    def __post_init__(self):
        padding, truncation = self.backend.padding, self.backend.truncation
        lengths = [padding and padding["length"], truncation and truncation["max_length"]]
        if lengths[0] is None or lengths[0] != lengths[1]:
            raise ValueError(
                f"texts are padded to {lengths[0]} tokens and cut off at {lengths[1]}: both must "
                "be the same number"
            )

    @property
    def length(self) -> int:
        """Number of tokens of every text, special ones and padding included."""
        return self.backend.padding["length"]

    @property
    def vocab_size(self) -> int:
        """Number of token ids, which are 0 to vocab_size - 1."""
        return max(self.backend.get_vocab().values()) + 1

    @property
    def pad(self) -> int:
        """The token id of padding."""
        return self.backend.padding["pad_id"]

    @functools.cached_property
    def end(self) -> int:
        """The token id at the end of a text, before padding."""
        empty = self.backend.encode("")
        return empty.ids[sum(empty.attention_mask) - 1]

    @functools.cached_property
    def unknown(self) -> int | None:
        """The token id of text that the vocabulary lacks; None if it can express any text."""
        model = json.loads(self.to_json())["model"]
        token = model.get("unk_token")
        return model.get("unk_id") if token is None else self.backend.token_to_id(token)

    def __call__(self, texts: Iterable[str]) -> Int32[np.ndarray, "texts length"]:
        """The token ids of texts. Long texts are cut off and short ones padded.

        Raises:
            TypeError: `texts` is a single text.
        """
        return np.array([encoding.ids for encoding in self._encode(texts)], np.int32).reshape(
            -1, self.length
        )

    def report(self, texts: Iterable[str]) -> Report:
        """Counts the texts that `__call__` cuts off, and the tokens that are unknown."""
        encodings = self._encode(texts)
        return Report(
            texts=len(encodings),
            truncated=sum(bool(encoding.overflowing) for encoding in encodings),
            tokens=sum(sum(encoding.attention_mask) for encoding in encodings),
            unknown=sum(len(self._unknown_spans(encoding)) for encoding in encodings),
        )

    def check(self, prompt: str) -> None:
        """Checks a user's prompt more strictly than captions of a data set are checked.

        Raises:
            UserError: The prompt is empty or too long, or has pieces that the vocabulary lacks.
        """
        if not prompt.strip():
            raise UserError("the prompt is empty: say what the image should show")
        try:
            (encoding,) = self._encode([prompt])
        except (TypeError, UnicodeEncodeError) as error:  # raised for bytes that were no UTF-8
            raise UserError(f"the prompt {prompt!a} is no text in UTF-8") from error
        spans = self._unknown_spans(encoding)
        unknown = [prompt[start : _with_marks(prompt, end)] for start, end in spans]
        if unknown:
            named = ", ".join(repr(piece) for piece in dict.fromkeys(unknown))
            raise UserError(
                f"the prompt {_short(prompt)!r} has {named}, which the vocabulary does not know: "
                "use other words"
            )
        cut = self._cut_off(prompt, encoding)
        if cut:
            raise UserError(
                f"the prompt is longer than the {self.length} tokens that are read: shorten it, "
                f"{_short(cut)!r} at its end would be cut off"
            )

    def to_json(self) -> str:
        """The text of a `tokenizer.json`."""
        return self.backend.to_str()

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Makes a tokenizer from the text of a `tokenizer.json`.

        Raises:
            ValueError: The text is no tokenizer, or a tokenizer without a length.
        """
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(f"not the text of a tokenizer.json: {error}") from error
        return cls(backend)

    @classmethod
    def from_file(
        cls, path: str | os.PathLike, *, length: int, pad: str | None = None
    ) -> "Tokenizer":
        """Reads a published tokenizer.

        Args:
            path: One of these files, or the folder that holds them: `tokenizer.json`; for CLIP,
                `vocab.json` and `merges.txt`; for BERT, `vocab.txt`. A `tokenizer_config.json` in
                the same folder names the padding token, and says whether BERT's tokenizer turns
                letters into lower case. An address on the Hub names a file or folder there.
            length: Number of tokens of a text.
            pad: The padding token, if not that of the files.

        Raises:
            UserError: A file is missing or unreadable, or the vocabulary has no such token.
        """
        path = pathlib.Path(hub.local(path, only=_FILES)).expanduser()
        folder = path if path.is_dir() else path.parent
        try:
            backend, config = _read(path), _read_config(folder)
        except UserError:
            raise
        except Exception as error:  # the library raises plain Exceptions
            raise UserError(f"{path}: not a readable tokenizer: {error}") from error
        own = config.get("pad_token") or (backend.padding or {}).get("pad_token")
        own = own.get("content") if isinstance(own, dict) else own
        candidates = [pad] if pad else [own, *_PADS]
        known = [token for token in candidates if token and backend.token_to_id(token) is not None]
        if not known:
            raise UserError(f"{path}: the vocabulary has no {pad or 'padding token'}; name another")
        return cls(_with_length(backend, length, known[0]))

    @classmethod
    def clip(
        cls, vocabulary: dict[str, int], merges: list[tuple[str, str]], *, length: int
    ) -> "Tokenizer":
        """Makes a tokenizer of CLIP's kind.

        Args:
            vocabulary: Token ids of the pieces, with `<|startoftext|>` and `<|endoftext|>`.
            merges: Pairs of pieces that are merged, in the order of merging.
            length: Number of tokens of a text.

        Raises:
            UserError: The vocabulary lacks one of the two special tokens.
        """
        return cls(_with_length(_clip(vocabulary, merges, "the vocabulary"), length, _CLIP_END))

    @classmethod
    def train(cls, captions: Iterable[str], *, vocab_size: int, length: int) -> "Tokenizer":
        """Learns a vocabulary from captions by byte-pair encoding: frequent pairs are merged first.

        The tokenizer turns capital letters into small ones, composes letters with accents, and
        reads punctuation that no caption has as a space. The same captions give the same
        vocabulary, in any order and in every process.

        Args:
            captions: The captions.
            vocab_size: Largest number of tokens: special ones, letters, and merged pieces.
            length: Number of tokens of a text, start and end included.

        Raises:
            ValueError: There are no captions, or their letters alone exceed `vocab_size`.
        """
        captions = [unicodedata.normalize("NFC", caption) for caption in captions]
        pad, unknown, start, end = SPECIAL_TOKENS
        backend = tokenizers.Tokenizer(models.BPE(unk_token=unknown, fuse_unk=True))
        backend.normalizer = normalizers.Sequence(
            [
                normalizers.NFC(),
                normalizers.Replace(tokenizers.Regex(_unseen_punctuation(captions)), " "),
                normalizers.BertNormalizer(strip_accents=False),
            ]
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.WhitespaceSplit(),
                pre_tokenizers.Metaspace(),  # marks where words begin
                pre_tokenizers.Punctuation(),
            ]
        )
        # No prefix or suffix marks pieces within words: with one, the library orders symbols
        # randomly.
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False
        )
        backend.train_from_iterator(captions, trainer)
        size = backend.get_vocab_size()
        if size == len(SPECIAL_TOKENS):
            raise ValueError("there are no captions to learn a vocabulary from")
        if size > vocab_size:
            raise ValueError(f"vocab_size is {vocab_size}; the letters of the captions take {size}")
        return cls(_with_length(_between(backend, start, end), length, pad))

    def _encode(self, texts: Iterable[str]) -> list[tokenizers.Encoding]:
        if isinstance(texts, str):
            raise TypeError(f"texts is the single text {texts!r}; a list of texts is expected")
        texts = [str(text) for text in texts]
        # The threads of the pipeline encode one text at a time; a batch would start the threads of
        # the library.
        return (
            self.backend.encode_batch(texts)
            if len(texts) > 1
            else [*map(self.backend.encode, texts)]
        )

    def _unknown_spans(self, encoding: tokenizers.Encoding) -> list[tuple[int, int]]:
        """The parts of the text, as (start, end), that became unknown tokens."""
        rows = zip(encoding.ids, encoding.special_tokens_mask, encoding.offsets, strict=True)
        return [span for token, special, span in rows if token == self.unknown and not special]

    def _cut_off(self, text: str, encoding: tokenizers.Encoding) -> str:
        """The end of a text, from the first word that is cut off in whole or in part."""
        starts = [
            start
            for part in encoding.overflowing
            for (start, _), special in zip(part.offsets, part.special_tokens_mask, strict=True)
            if not special
        ]
        if not starts:
            return ""
        return text[text.rfind(" ", 0, min(starts) + 1) + 1 :]


def _read(path: pathlib.Path) -> tokenizers.Tokenizer:
    """Reads a tokenizer of the library, without a length; see `Tokenizer.from_file`."""
    folder = path if path.is_dir() else path.parent
    names = ("tokenizer.json", "vocab.json", "vocab.txt") if path.is_dir() else (path.name,)
    name = next((name for name in names if (folder / name).exists()), None)
    if name is None:
        raise UserError(
            f"{path}: no tokenizer there; expected tokenizer.json, vocab.json and merges.txt, or "
            "vocab.txt (from a spiece.model, transformers' save_pretrained makes a tokenizer.json)"
        )
    if name == "vocab.json" or name == "merges.txt":
        files = str(folder / "vocab.json"), str(folder / "merges.txt")
        vocabulary, merges = models.BPE.read_file(*files)
        return _clip(vocabulary, merges, f"{folder}/vocab.json")
    if name.endswith(".txt"):
        return _bert(folder / name, _read_config(folder).get("do_lower_case", True))
    return tokenizers.Tokenizer.from_file(str(folder / name))


def _read_config(folder: pathlib.Path) -> dict:
    path = folder / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _clip(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], where: str
) -> tokenizers.Tokenizer:
    """CLIP's tokenizer: lower-case words as bytes, with a mark at the last piece of each word."""
    missing = [token for token in (_CLIP_START, _CLIP_END) if token not in vocabulary]
    if missing:
        raise UserError(f"{where} has no {missing[0]}, so it is not CLIP's vocabulary")
    model = models.BPE(vocabulary, merges, unk_token=_CLIP_END, end_of_word_suffix="</w>")
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    words = tokenizers.Regex(_CLIP_WORDS)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.add_special_tokens([_CLIP_START, _CLIP_END])
    return _between(backend, _CLIP_START, _CLIP_END)


def _bert(path: pathlib.Path, lowercase: bool) -> tokenizers.Tokenizer:
    """BERT's tokenizer, which reads word pieces."""
    vocabulary = {line: number for number, line in enumerate(read_lines(path))}
    missing = [token for token in _BERT_TOKENS if token not in vocabulary]
    if missing:
        raise UserError(f"{path} has no {missing[0]}, so it is not BERT's vocabulary")
    _, unknown, start, end = _BERT_TOKENS
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(list(_BERT_TOKENS))
    return _between(backend, start, end)


def _unseen_punctuation(texts: Iterable[str]) -> str:
    """A regular expression for the punctuation that these texts lack."""
    seen = "".join(sorted({letter for text in texts for letter in text if not letter.isalnum()}))
    return rf"[\p{{P}}&&[^\s{re.escape(seen)}]]"


def _between(backend: tokenizers.Tokenizer, start: str, end: str) -> tokenizers.Tokenizer:
    """Makes a tokenizer put a start and an end token around every text."""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(token, backend.token_to_id(token)) for token in (start, end)],
    )
    return backend


def _with_length(backend: tokenizers.Tokenizer, length: int, pad: str) -> tokenizers.Tokenizer:
    """Makes a tokenizer with one length for all texts."""
    least = backend.num_special_tokens_to_add(is_pair=False) + 1
    if length < least:
        raise ValueError(
            f"length is {length}; it must be at least {least}, special tokens included"
        )
    backend.enable_truncation(length)
    backend.enable_padding(length=length, pad_id=backend.token_to_id(pad), pad_token=pad)
    return backend


def _with_marks(text: str, end: int) -> int:
    """The end of the combining accents that follow the letter before `end`."""
    while end < len(text) and unicodedata.combining(text[end]):
        end += 1
    return end


def _short(text: str) -> str:
    return textwrap.shorten(text, 80, placeholder=" ...")
