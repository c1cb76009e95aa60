"""Shows data on a page: a contact sheet, sizes, brightness, classes and the words of captions.

    OUT/index.html, OUT/contact_sheet.png

The page needs no network. It is drawn from some records that are evenly spaced over the split.
"""

import collections
import html
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from absl import logging
from PIL import Image, ImageOps

from conprediff_jax.common.errors import DataError, printable
from conprediff_jax.common.files import write_text
from conprediff_jax.common.images import BadImage, captioned, grid, write_png
from conprediff_jax.data import sources, transforms

_MOST = 2_000  # records that are decoded for a page
_ON_SHEET = 64
_SIDE = 112  # pixels of an image on the contact sheet
_BINS = 16  # of the histogram of brightness
_WORDS = 40
_STYLE = (
    "body{font:15px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "img{max-width:100%}td{padding:0 .6em 0 0;white-space:nowrap}"
    "i{display:inline-block;height:.7em;background:#47a}"
)


def write_page(
    source: sources.Source,
    title: str,
    out: str | os.PathLike,
    text: str | None = None,
    report: Sequence[str] = (),
) -> pathlib.Path:
    """Writes a page that shows a source.

    Args:
        source: The data.
        title: Name of the data.
        out: Folder to write to.
        text: Name of the feature that holds the captions, or None.
        report: Lines that are shown as they are.

    Returns:
        The file of the page.

    Raises:
        DataError: No image can be decoded.
        WriteError: Nothing can be written there.
    """
    out = pathlib.Path(out).expanduser()
    count = min(len(source), _MOST)
    indices = [place * len(source) // count for place in range(count)]
    with ThreadPoolExecutor() as pool:
        looks = list(pool.map(lambda index: _look(source[index], text), indices))
    seen = [look for look in looks if isinstance(look, dict)]
    bad = [look for look in looks if isinstance(look, str)]
    if not seen:
        raise DataError(f"{title}: no image can be decoded, such as {bad[0]}")
    for look in bad[:5]:
        logging.warning("left out %s", look)
    shown = min(len(seen), _ON_SHEET)
    sheet = [seen[place * len(seen) // shown] for place in range(shown)]
    thumbs = np.stack([look["thumb"] for look in sheet])
    texts = [look["texts"][0] if look["texts"] else "" for look in sheet]
    if any(texts):
        thumbs = captioned(thumbs, [printable(text)[:120] for text in texts], least=_SIDE)
    write_png(out / "contact_sheet.png", grid(thumbs, columns=8, least=1))
    page = out / "index.html"
    write_text(page, _html(title, len(source), seen, bad, source.class_names, report))
    return page


def _look(record: dict[str, Any], text: str | None) -> dict[str, Any] | str:
    """What the page needs of a record, or its name and why its image cannot be decoded."""
    try:
        if "unreadable" in record:
            raise BadImage(record["unreadable"])
        image = transforms.decode(record["image"])
    except BadImage as error:
        return f"{printable(record['name'])}: {error}"
    texts = record[text] if text else []
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX))
    return {
        "thumb": np.asarray(ImageOps.pad(image, (_SIDE, _SIDE), color="#ddd")),
        "size": image.size,
        "brightness": np.histogram(grey, _BINS, (0, 256))[0],
        "texts": ([texts] if texts else []) if isinstance(texts, str) else texts,
        "label": record.get("label"),
    }


def _html(
    title: str,
    count: int,
    seen: Sequence[dict[str, Any]],
    bad: Sequence[str],
    class_names: Sequence[str] | None,
    report: Sequence[str],
) -> str:
    """The page as HTML."""
    texts = [text for look in seen for text in look["texts"]]
    words = collections.Counter(word for text in texts for word in _words(text))
    sides = collections.Counter(min(look["size"]) // 64 * 64 for look in seen)
    shapes = collections.Counter(_shape(*look["size"]) for look in seen)
    brightness = sum(look["brightness"] for look in seen)
    lengths = collections.Counter(len(text.split()) for text in texts)
    steps = [f"{256 * i // _BINS} to {256 * (i + 1) // _BINS - 1}" for i in range(_BINS)]
    sections = [
        ("Shorter side in pixels", [(f"{s} to {s + 63}", n) for s, n in sorted(sides.items())]),
        ("Shape", shapes.most_common()),
        ("Brightness of pixels, 0 is black", list(zip(steps, brightness.tolist(), strict=True))),
    ]
    if class_names:
        labels = collections.Counter(class_names[look["label"]] for look in seen)
        sections.append(("Classes", labels.most_common(_WORDS)))
    if texts:
        sections.append(("Words of a caption", sorted(lengths.items())))
        sections.append(("Words that captions have most often", words.most_common(_WORDS)))
    said = [f"{count:,} images, of which {len(seen) + len(bad):,} were looked at.", *report]
    said += [f"cannot be decoded: {name}" for name in bad[:20]]
    paragraphs = "".join(f"<p>{html.escape(line)}</p>" for line in said)
    bars = "".join(f"<h2>{html.escape(name)}</h2>{_bars(rows)}" for name, rows in sections)
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    sheet = '<img src="contact_sheet.png" alt="contact sheet">'
    return f"<!doctype html>{head}<h1>{html.escape(title)}</h1>{paragraphs}{sheet}{bars}\n"


def _words(text: str) -> Iterable[str]:
    return re.findall(r"\w+", text.lower())


def _shape(width: int, height: int) -> str:
    if width == height:
        return "square"
    return "landscape" if width > height else "portrait"


def _bars(rows: Sequence[tuple[Any, int]]) -> str:
    """A table of names and counts with a bar for each."""
    most = max((count for _, count in rows), default=1) or 1
    cells = [
        f"<tr><td>{html.escape(str(name))}<td>{count:,}"
        f'<td><i style="width:{20 * count / most:.2f}em"></i>'
        for name, count in rows
    ]
    return f"<table>{''.join(cells)}</table>"
