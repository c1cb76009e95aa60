"""The headers of config files, which say what a config trains and what it needs.

A header is the docstring of the file. Its first line says what is trained. Further down, five
paragraphs begin with a name and a colon:

    Size: 64 x 64, 4.5 M parameters.
    Needs:
        runs/openmoji_kl: the first stage, by python -m conprediff_jax.main
            --config=configs/first_stage/openmoji_kl.py
        runs/openmoji_latents: the latents, by python -m conprediff_jax.precompute
            --config=configs/openmoji_latent.py
    Hardware: 2 CPU cores. The run takes 3 GB of memory.
    Hours: 0.2 (5,000 steps at 7 to 11 a second).
    Expected: a final loss of about 0.098. The grid shows busts with clean outlines.

`Needs: nothing.` is for configs whose data come by themselves. A need is named as the config names
it: by the path or the name that is the value of a key. The first sentence of `Hardware` groups the
configs in a list. Nothing is imported to read a header.
"""

import ast
import itertools
import pathlib
import re
from typing import NamedTuple

SHIPPED = pathlib.Path(__file__).parents[2] / "configs"
FIELDS = ("Size", "Needs", "Hardware", "Hours", "Expected")

_FIELD = re.compile(
    rf"^({'|'.join(FIELDS)}):(.*(?:\n(?!(?:{'|'.join(FIELDS)}):).+)*)", re.MULTILINE
)
_NEED = re.compile(r"^    (\S+): (.*(?:\n     .*)*)", re.MULTILINE)
_PARAMETERS = re.compile(r"([\d.,]+) M parameters")


class Header(NamedTuple):
    """What the docstring of a config file says; texts without line breaks, '' where there is none.

    Attributes:
        path: The file.
        what: What is trained, the first line.
        size: Size of the images and number of parameters.
        needs: What has to be there first, and how to get it.
        hardware: The hardware that the config is made for.
        hours: The duration of the whole run on this hardware.
        expected: What to expect of it.
        lacking: The fields that the docstring lacks.
    """

    path: pathlib.Path
    what: str
    size: str
    needs: dict[str, str]
    hardware: str
    hours: str
    expected: str
    lacking: tuple[str, ...]

    @property
    def group(self) -> str:
        """The first sentence of `hardware`."""
        return _sentence(self.hardware) or "hardware not stated"

    @property
    def parameters(self) -> float:
        """The number of parameters, in millions; 0 if it is not stated."""
        found = _PARAMETERS.search(self.size)
        return float(found[1].replace(",", "")) if found else 0.0


def read(path: pathlib.Path) -> Header:
    """The header of a config file; its fields are empty where the file has no docstring.

    Args:
        path: A Python file without syntax errors.
    """
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    fields = dict(_FIELD.findall(text))
    needs = {place: _line(how) for place, how in _NEED.findall(fields.get("Needs", ""))}
    return Header(
        path=path,
        what=text.partition("\n")[0],
        size=_line(fields.get("Size", "")),
        needs=needs,
        hardware=_line(fields.get("Hardware", "")),
        hours=_line(fields.get("Hours", "")),
        expected=_line(fields.get("Expected", "")),
        lacking=tuple(name for name in FIELDS if name not in fields),
    )


def grouped(folder: pathlib.Path = SHIPPED) -> dict[str, list[Header]]:
    """The headers of all configs in a folder by their hardware, smaller models first.

    Args:
        folder: A folder of config files, which may lie in subfolders.
    """
    found = sorted(map(read, folder.rglob("*.py")), key=_size)
    groups: dict[str, list[Header]] = {}
    for header in found:
        groups.setdefault(header.group, []).append(header)
    return dict(sorted(groups.items(), key=lambda group: _size(group[1][-1])))


def listing(folder: pathlib.Path = SHIPPED) -> str:
    """A list of the configs in a folder for a terminal, one line each; see `grouped`."""
    groups = grouped(folder)
    if not groups:
        return f"There are no configs in {folder}: they are part of the repository."
    width = max(len(_name(header, folder)) for header in itertools.chain(*groups.values()))
    lines = []
    for group, headers in groups.items():
        lines += [f"{group[:1].upper()}{group[1:]}:"]
        for header in headers:
            needs = f" Needs {', '.join(header.needs)}." if header.needs else ""
            name = _name(header, folder).ljust(width)
            lines += [f"  {name}  {_sentence(header.size):<31} {header.what}{needs}"]
        lines += [""]
    return "\n".join(lines[:-1])


def table(folder: pathlib.Path = SHIPPED) -> str:
    """A table of the configs in a folder for each group, in Markdown; see `grouped`."""
    lines = []
    for group, headers in grouped(folder).items():
        lines += [f"**{group[:1].upper()}{group[1:]}**", ""]
        lines += ["| config | what it trains | size | hours | needs |", "|---|---|---|---|---|"]
        for header in headers:
            needs = ", ".join(f"`{place}`" for place in header.needs) or "nothing"
            cells = [f"`{_name(header, folder)}`", header.what, _sentence(header.size)]
            cells += [re.split(r" \(|[.,] ", header.hours)[0], needs]
            lines += [f"| {' | '.join(cell.rstrip('.') for cell in cells)} |"]
        lines += [""]
    return "\n".join(lines[:-1])


def _size(header: Header) -> float:
    return header.parameters


def _name(header: Header, folder: pathlib.Path) -> str:
    return f"{folder.name}/{header.path.relative_to(folder).as_posix()}"


def _sentence(text: str) -> str:
    """The first sentence of a text, without its full stop."""
    return re.split(r"\.(?: |$)", text)[0]


def _line(text: str) -> str:
    return " ".join(text.split())
