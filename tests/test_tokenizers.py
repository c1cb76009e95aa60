"""Tests of tokenizers against those of transformers, and of prompts that do not fit."""

import json
import pickle

import numpy as np
import pytest
import transformers
from vocabularies import bert_folder, clip_folder

from conprediff_jax.common.errors import UserError
from conprediff_jax.data import Tokenizer

LENGTH = 12
TEXTS = (
    "The cat",
    "and the RED cat's 42 hats",
    "naïve  \tcafé — don't; 日本 🙂",
    "a " * 40,
    "",
    "<|endoftext|> [SEP] </s>",
)


def t5_folder(folder):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁the", -3.0)]
    pieces += [("▁cat", -3.5), ("▁and", -3.2), ("hat", -4.0), ("s", -4.1), ("▁a", -2.5)]
    pieces += [(letter, -6.0) for letter in "abcdehnortT42RED'"]
    theirs = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    theirs.save_pretrained(folder)
    return theirs


FOLDERS = {"clip": clip_folder, "bert": bert_folder, "t5": t5_folder}


@pytest.mark.parametrize("kind", sorted(FOLDERS))
def test_token_ids_are_those_of_transformers(kind, tmp_path):
    theirs = FOLDERS[kind](tmp_path)
    ours = Tokenizer.from_file(tmp_path, length=LENGTH)
    options = {"padding": "max_length", "max_length": LENGTH, "truncation": True}
    expected = np.array(theirs(list(TEXTS), **options)["input_ids"])
    found = ours(TEXTS)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)
    assert (ours.pad, ours.end) == (theirs.pad_token_id, expected[4][1 if kind != "t5" else 0])
    assert ours.vocab_size == len(theirs) and ours.unknown == theirs.unk_token_id

    theirs.save_pretrained(tmp_path / "saved")  # as one tokenizer.json
    again = Tokenizer.from_file(tmp_path / "saved" / "tokenizer.json", length=LENGTH)
    np.testing.assert_array_equal(again(TEXTS), expected)
    restored = Tokenizer.from_json(ours.to_json())
    np.testing.assert_array_equal(restored(TEXTS), expected)


def test_padding_is_what_the_files_or_the_caller_say(tmp_path):
    clip_folder(tmp_path)
    assert Tokenizer.from_file(tmp_path, length=5, pad="!").pad == 0
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": {"content": "!"}}')
    tokenizer = Tokenizer.from_file(tmp_path, length=5)
    assert tokenizer.pad == 0 and tokenizer.end == tokenizer.vocab_size - 1
    np.testing.assert_array_equal(tokenizer(["cat"])[0, 2:], [tokenizer.end, 0, 0])
    with pytest.raises(UserError, match=r"the vocabulary has no \[NONE\]; name another"):
        Tokenizer.from_file(tmp_path, length=5, pad="[NONE]")


CAPTIONS = ["woman cook medium-light skin tone", "man cook dark skin tone", "person in Bed", "cook"]


def trained(**changes):
    return Tokenizer.train(CAPTIONS, **{"vocab_size": 60, "length": 10} | changes)


def test_a_vocabulary_is_learnt_from_captions():
    tokenizer = trained()
    assert tokenizer.vocab_size <= 60
    # Every process of a run learns the same vocabulary, in any order of captions.
    assert trained().to_json() == tokenizer.to_json()
    assert Tokenizer.train(CAPTIONS[::-1], vocab_size=60, length=10).to_json() == (
        tokenizer.to_json()
    )
    tokens = tokenizer(CAPTIONS)
    assert tokens.shape == (4, 10) and (tokens[:, 0] == 2).all()
    assert (tokens == tokenizer.end).sum() == 4 and tokenizer.pad == 0
    assert (tokens[3, 3:] == 0).all()  # "cook" is common enough for a token of its own
    np.testing.assert_array_equal(tokenizer(["  PERSON  in bed"]), tokenizer(["person in bed"]))
    # Punctuation in captions is read, and other punctuation in a prompt is ignored.
    read, same = tokenizer(["man: medium-light, [dark]?"]), tokenizer(["man medium-light dark"])
    np.testing.assert_array_equal(read, same)
    assert (tokenizer(["medium light"]) != tokenizer(["medium-light"])).any()
    np.testing.assert_array_equal(tokenizer([""])[0], [2, tokenizer.end, *[0] * 8])
    assert tokenizer([]).shape == (0, 10)
    for copy in (Tokenizer.from_json(tokenizer.to_json()), pickle.loads(pickle.dumps(tokenizer))):
        np.testing.assert_array_equal(copy(CAPTIONS), tokens)
        assert copy.to_json() == tokenizer.to_json()


def test_truncated_and_unknown_tokens_are_counted():
    tokenizer = trained(length=6)
    report = tokenizer.report(["cook", "", "cook 7 cook", "man cook dark skin tone"])
    assert (report.texts, report.truncated, report.unknown) == (4, 1, 1)
    assert report.tokens == 3 + 2 + 6 + 6  # with start and end


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (" ", "the prompt is empty"),
        ("cook ψ cook ψξ", "the prompt 'cook ψ cook ψξ' has 'ψ', 'ψξ', which the vocabulary"),
        (
            "cook " * 7 + "bonks  tone",  # the eighth is begun, not ended
            "longer than the 10 tokens that are read: shorten it, 'bonks tone' at its end would",
        ),
    ],
)
def test_a_prompt_that_does_not_fit_is_explained(prompt, message):
    tokenizer = trained()
    with pytest.raises(UserError, match=message) as caught:
        tokenizer.check(prompt)
    assert "\n" not in str(caught.value)
    tokenizer.check("woman in bed")
    assert tokenizer([prompt]).shape == (1, 10)  # as data it will do


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer there; expected tokenizer\.json"):
        Tokenizer.from_file(tmp_path, length=8)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a readable tokenizer"):
        Tokenizer.from_file(tmp_path, length=8)
    (tmp_path / "vocab.txt").write_text("the\ncat\n")
    with pytest.raises(UserError, match=r"has no \[PAD\], so it is not BERT's vocabulary"):
        Tokenizer.from_file(tmp_path / "vocab.txt", length=8)
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(
        UserError, match=r"has no <\|startoftext\|>, so it is not CLIP's vocabulary"
    ):
        Tokenizer.from_file(tmp_path / "vocab.json", length=8)
    with pytest.raises(ValueError, match=r"not the text of a tokenizer\.json"):
        Tokenizer.from_json("nothing")
    with pytest.raises(ValueError, match="both must be the same number"):
        bare = json.loads(trained().to_json()) | {"padding": None}
        Tokenizer.from_json(json.dumps(bare))
    with pytest.raises(ValueError, match="vocab_size is 9; the letters of the captions take"):
        trained(vocab_size=9)
    with pytest.raises(ValueError, match="there are no captions"):
        Tokenizer.train([], vocab_size=9, length=8)
    with pytest.raises(ValueError, match="length is 2; it must be at least 3"):
        trained(length=2)
    with pytest.raises(TypeError, match="the single text 'cook'"):
        trained()("cook")
