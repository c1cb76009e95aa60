"""Small vocabularies in the file formats of published tokenizers."""

import json

import transformers
from tokenizers import pre_tokenizers


def clip_folder(folder):
    """CLIP's two files, with a small vocabulary."""
    merges = ["a n", "an d</w>", "c a", "ca t</w>", "r e", "re d</w>", "i n", "t h", "th e</w>"]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols += [symbol + "</w>" for symbol in symbols]
    symbols += ["".join(merge.split()) for merge in merges]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return transformers.CLIPTokenizer.from_pretrained(folder)


def bert_folder(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "and", "red", "'", "s"]
    words += ["hat", "##s", "4", "##2", "naive", "cafe", "a", "日", "don", "t", "##a", ";"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return transformers.BertTokenizer.from_pretrained(folder)
