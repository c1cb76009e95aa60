"""Which of some names somebody meant who wrote another one."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is nearest to a name.

    It is the one with these initials (`lr` for `learning_rate`), or else one that is spelt almost
    alike, or else one with a word in common or the beginning of one (`eps` for `epsilon`).

    Args:
        name: The name that is not known.
        known: The names that are known.

    Returns:
        The nearest name; None if no name is near.
    """
    known = list(known)
    alike = difflib.get_close_matches(name.lower(), known, 1, 0.55)
    found = [other for other in known if _initials(other) == name.lower()]
    found += alike or [other for other in known if _share_a_word(name.lower(), other)]
    return found[0] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The question that names the nearest known name, with a space behind it; '' if none is near.

    Args:
        name: The name that is not known.
        known: The names that are known.
    """
    near = nearest(name, known)
    return f"did you mean {near!r}? " if near else ""


def _initials(name: str) -> str:
    words = name.split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else ""


def _share_a_word(name: str, other: str) -> bool:
    """Whether a word of one name begins with a word of the other one, of three letters or more."""
    return any(
        len(shorter) >= 3 and longer.startswith(shorter)
        for mine in name.split("_")
        for theirs in other.split("_")
        for shorter, longer in [sorted((mine, theirs), key=len)]
    )
