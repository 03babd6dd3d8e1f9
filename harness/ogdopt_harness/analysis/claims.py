"""What a study of a paper found: claims with one value and one verdict a seed, tables, figures; written, and read again.

    <study>/study.md      the page: verdicts, tables, figures
    <study>/<figure>.svg
    <study>/study.json    claims, seeds, numbers; written last, so that a folder with it is finished

A claim holds if it holds in every seed, of at least five; anything less is reported as not holding.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ogdopt_harness.common.files import write_json, write_text
from ogdopt_harness.common.tables import Table, markdown_text, tiny

ENOUGH = 5
"""Seeds that a claim needs."""
FILE = "study.json"
HOLDS, FAILS = "holds", "does not hold"


@dataclass(frozen=True)
class Claim:
    """One statement about a study's numbers, next to what the paper says."""

    text: str
    expectation: str
    """What the paper says or shows, and where; or that it says nothing."""
    values: Sequence[float]
    """The number that the statement is about, one a seed."""
    holds: Sequence[bool]
    """Whether the statement is true, one a seed."""

    def __post_init__(self) -> None:
        assert len(self.values) == len(self.holds), f"{self.text}: {len(self.values)} values, {len(self.holds)} verdicts"

    @property
    def verdict(self) -> str:
        """`holds` or `does not hold`."""
        return HOLDS if len(self.holds) >= ENOUGH and all(self.holds) else FAILS

    @property
    def found(self) -> str:
        """The median over the seeds and their range."""
        low, middle, high = (tiny(x, 3) for x in (min(self.values), statistics.median(self.values), max(self.values)))
        return middle if low == high else f"{middle} [{low}…{high}]"

    @property
    def count(self) -> str:
        """In how many seeds the statement is true."""
        few = f" (too few: {ENOUGH} needed)" if len(self.holds) < ENOUGH else ""
        return f"{sum(map(bool, self.holds))} of {len(self.holds)}{few}"


@dataclass(frozen=True)
class Picture:
    """A figure of a study: the file's name without its suffix, and what to look for."""

    name: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Findings:
    """What a study returns."""

    seeds: Sequence[int]
    claims: Sequence[Claim]
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    notes: Sequence[str] = ()
    """What a reader must know to judge the claims, one paragraph each."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """Everything else that study.json keeps."""

    def __post_init__(self) -> None:
        for claim in self.claims:
            assert len(claim.holds) == len(self.seeds), f"{claim.text}: {len(claim.holds)} verdicts, {len(self.seeds)} seeds"


@dataclass(frozen=True)
class Finished:
    """A finished study, as its study.json has it."""

    name: str
    title: str
    page: Path
    claims: list[Claim]

    @property
    def table(self) -> Table:
        """Its verdicts."""
        return verdicts(self.title, self.claims)


def verdicts(title: str, claims: Iterable[Claim]) -> Table:
    """One row a claim: what was found next to what the paper says."""
    claims = list(claims)
    rows = [[c.text, c.expectation, c.found, c.count, c.verdict] for c in claims]
    note = (
        f"{sum(c.verdict == HOLDS for c in claims)} of {len(claims)} claims hold: in every seed, of at least {ENOUGH}. "
        "Found: median over the seeds, in brackets the lowest and highest."
    )
    return Table(title, ["claim", "the paper", "found", "seeds", "verdict"], rows, note)


def write(folder: Path, name: str, title: str, found: Findings, facts: dict[str, Any]) -> Table:
    """Write the figures, study.md and, last, study.json into `folder`; `facts` say how it was run. Returns the verdicts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).unlink(missing_ok=True)
    for picture in found.pictures:
        picture.figure.savefig(folder / f"{picture.name}.svg", metadata={"Date": None})
    table = verdicts("Verdicts", found.claims)
    parts = [f"# {markdown_text(title)}", *map(markdown_text, found.notes), f"## {table.title}", table.markdown(), table.note]
    for other in found.tables:
        parts += [f"## {markdown_text(other.title)}", other.markdown(), markdown_text(other.note)]
    for picture in found.pictures:
        parts += [f"![{markdown_text(picture.name)}]({picture.name}.svg)", markdown_text(picture.caption)]
    parts += ["## How it was run", "\n".join(f"- {markdown_text(f'{k}: {v}')}" for k, v in facts.items())]
    write_text(folder / "study.md", "\n\n".join(part for part in parts if part) + "\n")
    claims = [
        {
            "text": claim.text,
            "expectation": claim.expectation,
            "values": [float(v) for v in claim.values],
            "holds": [bool(h) for h in claim.holds],
            "verdict": claim.verdict,
        }
        for claim in found.claims
    ]
    record = {"study": name, "title": title, "seeds": list(found.seeds), "claims": claims, "facts": facts}
    write_json(folder / FILE, record | {"notes": list(found.notes), "numbers": found.numbers})
    return table


def read(path: Path) -> Finished:
    """Read a study.json. Raises ValueError where the file is not one."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        claims = [Claim(c["text"], c["expectation"], c["values"], c["holds"]) for c in raw["claims"]]
        return Finished(raw["study"], raw["title"], path.with_name("study.md"), claims)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a readable study ({error!r}); run that study again, or delete its folder") from error


def finished(directory: Path) -> list[Finished]:
    """Studies that a run directory's report shows: in folders of it or of its `studies/`, and in `studies/` next to it."""
    places = [*directory.glob(f"*/{FILE}"), *directory.glob(f"studies/*/{FILE}"), *directory.parent.glob(f"studies/*/{FILE}")]
    return [read(path) for path in sorted(dict.fromkeys(places), key=lambda path: path.parent.name)]
