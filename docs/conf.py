"""Builds the documentation as pages for a browser: `make docs`.

The pages are the Markdown files of this folder and of the project's root, as they stand. Links
between them are turned into links of the site. The API reference comes from the docstrings.
"""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent

project = "conprediff_jax"
author = "the authors of conprediff_jax"
copyright = f"{author}; drawings by OpenMoji, CC BY-SA 4.0"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
root_doc = "index"

html_theme = "furo"
html_title = project
html_copy_source = False

myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
nb_execution_mode = "off"  # the tests run the notebook

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_use_ivar = True

# The pages that are files of the project's root.
OF_THE_ROOT = {"index": "README.md", "contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}


def linked(text: str, *, of_root: bool) -> str:
    """The text of a page with links that lead from page to page of the site.

    Args:
        text: The Markdown.
        of_root: Whether the file lies in the project's root, and not in `docs`.
    """
    if of_root:
        text = re.sub(r"\]\(docs/", "](", text)
    for page, file in OF_THE_ROOT.items():
        text = text.replace(f"]({'' if of_root else '../'}{file}", f"]({page}.md")
    return text


def read(app, docname: str, source: list[str]) -> None:
    """Puts the text of a file of the root in its page, and turns links."""
    file = OF_THE_ROOT.get(docname)
    if file:
        page = linked((ROOT / file).read_text(), of_root=True)
        source[0] = page + "\n" + source[0]
        return
    source[0] = linked(source[0], of_root=False)
    if docname.endswith("/report"):  # reports have no heading of their own
        source[0] = f"# The runs of {docname.split('/')[1]}\n\n{source[0]}"


def literal(app, what, name, obj, options, lines: list[str]) -> None:
    """Turns Markdown's `code` and equations in docstrings into what Sphinx reads."""
    if what == "module":  # where indented blocks are code, as in Markdown
        text = "\n".join(lines)
        lines[:] = re.sub(r"\n\n(?=    \S)(?<!    )", "\n\n::\n\n", text).split("\n")
    for index, line in enumerate(lines):
        if what == "module" and line.startswith("    "):
            continue
        line = re.sub(r"(?<![`:])`([^`]+)`(?!`)", r"``\1``", line)
        lines[index] = re.sub(r"(?<!\|)\|(?!\|)", r"\\|", line) if "``" not in line else line


def setup(app) -> None:
    """Connects the functions above with Sphinx."""
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", literal, priority=100)  # before napoleon
