"""Tests of caption files as editors write them, and of arbitrary files in their place."""

import io
import unicodedata

import numpy as np
import pytest
from fuzzing import fuzz

from conprediff_jax.common.errors import UserError
from conprediff_jax.data.text_files import read_captions
from conprediff_jax.data.tokenizers import Tokenizer

# What `str.splitlines` takes for the end of a line and editors do not, and other oddities.
SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
LETTERS = "aB é̈ñ漢🙂'\"()[],;\t\u200b " + SEPARATORS
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16")
CAPTIONS = ["a café", "the naïve señor", "Ångström"]


def refusal(path):
    """The message with which a file is refused: one line that begins with its name."""
    with pytest.raises(UserError) as caught:
        read_captions(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


def test_captions_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "captions.txt"

    def check(rng: np.random.Generator) -> None:
        lines = [
            "".join(rng.choice(list(LETTERS), rng.integers(0, 12)))
            for _ in range(rng.integers(0, 6))
        ]
        end = rng.choice(["\n", "\r\n", "\r"])
        ended = bool(rng.integers(2))
        text = end.join(lines) + end * ended
        path.write_bytes(text.encode(rng.choice(ENCODINGS)))
        written = lines if ended or (lines and lines[-1]) else lines[:-1]
        blank = [number for number, line in enumerate(written, 1) if not line.strip()]
        if len(blank) == len(written):
            assert "holds no captions" in refusal(path)
        elif blank:
            assert f"line {blank[0]} is blank" in refusal(path)
        else:
            assert read_captions(path) == written

    fuzz(check, few=200)


def test_bytes_of_any_kind_are_lines_of_text_or_refused(tmp_path):
    path = tmp_path / "captions.txt"
    pieces = [b"\n", b"\r", b"cat", b"\xc3\xa9", b"\xff", b"\xfe", b"\0", b"\xef\xbb\xbf", b" "]

    def check(rng: np.random.Generator) -> None:
        content = b"".join(pieces[i] for i in rng.integers(0, len(pieces), rng.integers(0, 9)))
        if rng.random() < 0.2:
            content = rng.bytes(int(rng.integers(0, 40)))
        path.write_bytes(content)
        try:  # Python's own reader, for what is UTF-8
            text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read()
        except UnicodeDecodeError:
            text = "\0"
        lines = text.replace("\ufeff", "").removesuffix("\n").split("\n")
        if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return  # UTF-16, if anything: see above
        if "\0" in text or not all(line.strip() for line in lines):
            refusal(path)
        else:
            assert read_captions(path) == lines

    fuzz(check, few=200)


def test_what_cannot_be_read_is_named(tmp_path):
    assert "No such file" in refusal(tmp_path / "missing.txt")
    assert "Is a directory" in refusal(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"cat\ncaf\xe9\n")
    assert "line 2 is no text in UTF-8" in refusal(tmp_path / "latin.txt")


def test_accents_are_the_same_however_they_are_composed():
    tokenizer = Tokenizer.train(CAPTIONS, vocab_size=80, length=24)
    decomposed = [unicodedata.normalize("NFD", caption) for caption in CAPTIONS]
    assert decomposed != CAPTIONS
    assert Tokenizer.train(decomposed, vocab_size=80, length=24).to_json() == tokenizer.to_json()

    def check(rng: np.random.Generator) -> None:
        letters = list("abcfghmnorstvïéñÅö ")
        prompt = "".join(rng.choice(letters, rng.integers(1, 20)))
        composed, other = (unicodedata.normalize(form, prompt) for form in ("NFC", "NFD"))
        np.testing.assert_array_equal(tokenizer([composed]), tokenizer([other]))
        assert tokenizer.report([composed]) == tokenizer.report([other])

    fuzz(check)
    with pytest.raises(UserError, match="has 'ü', which"):
        tokenizer.check(unicodedata.normalize("NFC", "a ü"))
    with pytest.raises(UserError, match="has 'u\u0308', which"):
        tokenizer.check("a u\u0308")
    with pytest.raises(UserError, match=r"'a\\udcff' is no text in UTF-8"):
        tokenizer.check("a\udcff")


def test_words_of_berts_vocabulary_may_hold_any_character(tmp_path):
    """Line 5 is one word: read as two, all words behind it would have other numbers."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a\u2028b", "cat"]
    (tmp_path / "vocab.txt").write_text("\ufeff" + "\n".join(words) + "\n", encoding="utf-8")
    tokenizer = Tokenizer.from_file(tmp_path, length=4)
    np.testing.assert_array_equal(tokenizer(["cat"]), [[2, 5, 3, 0]])
