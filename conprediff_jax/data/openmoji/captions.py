"""Reads role, gender and skin tone from OpenMoji's captions of people, and holds some of them out.

A caption such as "woman health worker medium skin tone" combines three attributes, and each of them
occurs in other captions too. A model that has learnt the attributes separately should draw
combinations that it has not seen. So one of the five skin tones of every role and gender is held
out:

    tone (hash(role) + number of the gender) mod 5                                               (1)

In training, every role and gender remains with four tones and without a tone. If a role has several
genders, each of its tones remains with another gender.
"""

import hashlib
import re
from typing import NamedTuple

GENDERS = ("person", "woman", "man")
SKIN_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")

_SKIN_TONE = re.compile(r"\b(medium-light|medium-dark|light|medium|dark) skin tone\b")
_GENDER = re.compile(r"\b(person|woman|man|girl|boy)\b")
_CHILDREN = {"girl": "woman", "boy": "man"}


class Attributes(NamedTuple):
    """What a caption says of a person.

    Attributes:
        role: The rest of the caption: an occupation, an action, hair or age; empty for a plain
            person. A girl or a boy is a "child".
        gender: One of `GENDERS`; `person` if the caption names neither a woman nor a man.
        skin_tone: One of `SKIN_TONES`; None if the caption names none, and the skin is yellow.
    """

    role: str
    gender: str
    skin_tone: str | None


def parse(caption: str) -> Attributes:
    """The attributes in a caption. A caption of anything but a person is a role alone."""
    tone = _SKIN_TONE.search(caption)
    rest = _SKIN_TONE.sub("", caption)
    word = _GENDER.search(rest)
    words = _GENDER.sub("", rest, count=1).split()
    gender = "person" if word is None else word[1]
    if gender in _CHILDREN:
        words, gender = ["child", *words], _CHILDREN[gender]
    role = " ".join("old" if word == "older" else word for word in words)  # "old man, older person"
    return Attributes(role, gender, tone and tone[1])


def held_out(caption: str) -> bool:
    """Whether the combination of attributes in a caption is held out from training, eq. (1)."""
    role, gender, tone = parse(caption)
    if tone is None:
        return False
    digest = hashlib.sha256(role.encode()).digest()
    number = int.from_bytes(digest[:8], "big") + GENDERS.index(gender)
    return SKIN_TONES.index(tone) == number % len(SKIN_TONES)
