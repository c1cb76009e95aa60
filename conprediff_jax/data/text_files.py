"""Reads text files of captions, as editors write them."""

import codecs
import os
import pathlib

from conprediff_jax.common.errors import UserError

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_lines(path: str | os.PathLike) -> list[str]:
    r"""The lines of a text file in UTF-8, or in UTF-16 with a byte-order mark.

    Lines end with \n, \r or \r\n. Other separators of Unicode, such as U+2028, are part of a line;
    byte-order marks are removed.

    Raises:
        UserError: The file cannot be read, or is no text.
    """
    try:
        content = pathlib.Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    encoding = "utf-16" if content.startswith(_UTF_16) else "utf-8"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line} is no text in {encoding.upper()}") from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "").split("\n")
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise UserError(f"{path}, line {number} is no text: it holds a zero character")
    return lines if lines[-1] else lines[:-1]


def decode_text(content: bytes) -> tuple[str, str]:
    r"""The text in the bytes of a file that nobody has checked, and its encoding.

    It is UTF-16 by its byte-order mark, else UTF-8, or else Windows-1252 (which is Latin-1 with
    typographic quotes). Lines end with \n; byte-order marks and zero characters are removed.
    """
    encoding = "utf-16" if content.startswith(_UTF_16) else "utf-8"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        encoding = "windows-1252"
        text = content.decode(encoding, "replace")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.replace("\ufeff", "").replace("\0", ""), encoding


def read_captions(path: str | os.PathLike) -> list[str]:
    """The captions of a text file, one on each line.

    Raises:
        UserError: The file is no text, holds no caption, or has a blank line; the message names
            the line.
    """
    lines = read_lines(path)
    if not any(line.strip() for line in lines):
        raise UserError(f"{path} holds no captions: write one a line")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UserError(f"{path}, line {number} is blank: write a caption, or delete it")
    return lines
