"""Writes the parts of docs/configs.md that follow from the code: `python docs/configs.py`.

The table of the shipped configs comes from their headers, and the list of all keys from the
docstrings of the sections' classes. Each part stands between two comments in the page.
"""

import pathlib
import re

from conprediff_jax.cli import headers
from conprediff_jax.config import reference

PAGE = pathlib.Path(__file__).parent / "configs.md"
PARTS = {"shipped configs": headers.table, "all keys": reference.page}


def written(page: str) -> str:
    """The page with its generated parts as they should be now.

    Args:
        page: The text of the page.
    """
    for name, make in PARTS.items():
        begin, end = f"<!-- begin: {name}, by docs/configs.py -->", f"<!-- end: {name} -->"
        assert begin in page and end in page, f"{PAGE} has no part {name!r}"
        pattern = f"{re.escape(begin)}.*{re.escape(end)}"
        part = f"{begin}\n\n{make()}\n\n{end}"
        page = re.sub(pattern, lambda _, part=part: part, page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
