"""Numbers as text, and tables of text for Markdown, HTML and the terminal."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

import rich.box
import rich.console
import rich.table
from rich.text import Text

NONE = "–"
GAP = 2
"""Columns of a terminal between two columns of a table."""
PROSE = 30
"""Longest cell that is never broken into lines on the terminal."""


@dataclass(frozen=True)
class Table:
    """A table of text: the first column names the row, the others are right-aligned; `note` says how to read it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    folded: bool = False  # in a fold-out in HTML
    strong: frozenset[int] = frozenset()  # rows set in bold

    def without_empty_columns(self) -> Table:
        """The same table without the columns in which no row has a value."""
        keep = [i for i in range(len(self.columns)) if i == 0 or any(row[i] not in ("", NONE) for row in self.rows)]
        rows = [[row[i] for i in keep] for row in self.rows]
        return Table(self.title, [self.columns[i] for i in keep], rows, self.note, self.folded, self.strong)

    def markdown(self) -> str:
        """The table in GitHub's Markdown; text from files cannot break out of its cell."""
        lines = [[markdown_text(cell) for cell in row] for row in self.rows]
        lines = [[f"**{cell}**" for cell in row] if i in self.strong else row for i, row in enumerate(lines)]
        head = [[markdown_text(name) for name in self.columns], [":--"] + ["--:"] * (len(self.columns) - 1)]
        return "\n".join("| " + " | ".join(row) + " |" for row in head + lines)

    def parts(self, width: int) -> list[Table]:
        """The table, or where it is wider than `width`, several that fit: each has the first column and some of the others."""
        cells = [[name, *(row[i] for row in self.rows)] for i, name in enumerate(self.columns)]
        wide = [max(map(len, column)) for column in cells]
        needs = [min(w, PROSE) if i == 0 or max(map(len, cells[i][1:]), default=0) > PROSE else w for i, w in enumerate(wide)]
        groups: list[list[int]] = [[]]
        for i in range(1, len(self.columns)):
            if groups[-1] and needs[0] + sum(needs[k] + GAP for k in [*groups[-1], i]) > width:
                groups.append([])
            groups[-1].append(i)
        if len(groups) == 1:
            return [self]
        found = []
        for number, group in enumerate(groups, 1):
            rows = [[row[0], *(row[i] for i in group)] for row in self.rows]
            title = f"{self.title} ({number} of {len(groups)})"
            found.append(Table(title, [self.columns[0], *(self.columns[i] for i in group)], rows, "", self.folded, self.strong))
        return found

    def show(self, console: rich.console.Console) -> None:
        """Print the table, in as many parts as the console's width needs."""
        for part in self.parts(console.width):
            console.print(part.terminal())

    def terminal(self) -> rich.table.Table:
        """The table for a rich console."""
        table = rich.table.Table(
            title=self.title, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
        )
        for i, name in enumerate(self.columns):
            prose = i == 0 or any(len(row[i]) > PROSE for row in self.rows)
            table.add_column(Text(name), justify="left" if prose else "right", no_wrap=not prose)
        for number, row in enumerate(self.rows):
            table.add_row(*(Text(cell, style="bold" if number in self.strong else "") for cell in row))
        return table


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{c}" if c in "|`*_[]\\" else c for c in escaped)


def number(value: float | None, digits: int = 2, sign: bool = False, unit: str = "") -> str:
    """A number with a real minus sign; a value that rounds to zero has none; None is a dash."""
    if value is None or value != value:
        return NONE
    text = f"{round(value, digits) + 0.0:{'+' if sign else ''}.{digits}f}"
    return text.replace("-", "−") + unit


def tiny(value: float, digits: int = 2) -> str:
    """A number of any size to so many significant digits.

    >>> tiny(-2.13e-7), tiny(-0.0918)
    ('−2.1e−07', '−0.092')
    """
    return f"{value:.{digits}g}".replace("-", "−")


def percent(rate: float | None, digits: int = 1) -> str:
    """A share of 1 as a percentage."""
    return number(None if rate is None else 100 * rate, digits, unit="%")


def interval(low: float, high: float, digits: int = 2) -> str:
    """`[low, high]`."""
    return f"[{number(low, digits)}, {number(high, digits)}]"


def spread(values: Sequence[float | None], digits: int = 2, sign: bool = False, scale: float = 1.0, unit: str = "") -> str:
    """The mean of the seeds' values, with `(min…max)` where there are several."""
    found = [scale * value for value in values if value is not None]
    if not found:
        return NONE
    return number(sum(found) / len(found), digits, sign, unit) + extent(found, digits, sign)


def extent(values: Sequence[float], digits: int = 2, sign: bool = False) -> str:
    """` (min…max)`, or nothing where both would read the same."""
    low, high = number(min(values), digits, sign), number(max(values), digits, sign)
    return "" if low == high else f" ({low}…{high})"


def cell_lines(cell: str) -> list[str]:
    """A cell's value, interval and range, each for a line of its own."""
    return re.split(r" (?=[\[(])", cell)


def p_text(p: float) -> str:
    """A p-value as `p = 0.03` or `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def listing(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""


def size(count: float) -> str:
    """Bytes in the unit that fits.

    >>> size(3 * 2**30), size(2_500_000), size(12)
    ('3.0 GiB', '2.4 MiB', '0.0 KiB')
    """
    unit = next((u for u in (3, 2) if count >= 0.95 * 1024**u), 1)
    return f"{count / 1024**unit:,.1f} {('KiB', 'MiB', 'GiB')[unit - 1]}"
