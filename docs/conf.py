"""How the site is built: `make docs`. Pages are Markdown; the API reference comes from the docstrings of ogdopt."""

import pkgutil
import re
from typing import Any

import ogdopt

project = "ogdopt"
version = release = ogdopt.__version__
copyright = "the authors of ogdopt, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"ogdopt {release}"
default_role = "code"
"""A word in single backticks is code, as in the docstrings."""
myst_heading_anchors = 3
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100

REFERENCE = """
### {module}

```{{eval-rst}}
.. automodule:: {module}
   :members:
```
"""


def relink(text: str) -> str:
    """Links between the repository's root and docs/ as links between the pages of the site, which are in one folder."""

    def page(found: re.Match[str]) -> str:
        name = found[1].lower()
        return f"]({'index' if name == 'readme' else name}.md"

    return re.sub(r"\]\((?:\.\./|docs/)?([A-Za-z_]+)\.md", page, text)


def read_page(app: Any, name: str, source: list[str]) -> None:
    """Relink a page; the reference also gets the modules that it does not list by hand."""
    source[0] = relink(source[0])
    if name == "api":
        listed = set(re.findall(r"automodule:: (\S+)", source[0]))
        modules = sorted(f"ogdopt.{m.name}" for m in pkgutil.iter_modules(ogdopt.__path__) if m.name[0] != "_")
        source[0] += "".join(REFERENCE.format(module=m) for m in modules if m not in listed)


def read_included(app: Any, path: Any, parent: str, source: list[str]) -> None:
    """Relink what a page includes."""
    source[0] = relink(source[0])


def as_markdown(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: what stands apart and indented is shown as it is, and bars and stars mean themselves."""
    shown: list[str] = []
    block = False
    for k, line in enumerate(lines):
        apart = k == 0 or not lines[k - 1].strip()
        if line.strip() and (apart or not block):
            indented = line.startswith("    ") or (line.startswith("  ") and not _in_list(lines[:k]))
            if apart and indented and not block:
                shown += ["::", ""]
            block = indented and (block or apart)
        shown.append(line if block or line.startswith(">>>") else _plain(line))
    lines[:] = shown


def _in_list(before: list[str]) -> bool:
    """Whether the last line that is not indented begins a list item."""
    outer = [line for line in before if line[:1].strip()]
    return bool(outer) and outer[-1].startswith("- ")


def _plain(line: str) -> str:
    """A line of prose, in which a bar is no substitution and a lone star no emphasis, outside of code."""
    parts = re.split(r"(`[^`]*`)", line)
    for k, part in enumerate(parts[::2]):
        part = part.replace("|", r"\|")
        parts[2 * k] = part.replace("*", r"\*") if part.count("*") % 2 else part
    return "".join(parts)


def setup(app: Any) -> None:
    """Connect the hooks above."""
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
    app.connect("autodoc-process-docstring", as_markdown)
