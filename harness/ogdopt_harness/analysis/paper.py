"""Table 1 of the OGD paper (Orthogonal Gradient Descent for preference optimization), next to a study's own figures.

Each method at its best epoch: Arena-Hard's style-controlled win rate and WildBench v0.2's Elo with 95% intervals, and TAX.
The paper calls A comparable to B where A is better or the intervals overlap (section 6). Its two headline figures follow from
the table: 99.15% is 1 - TAX(OGD)/TAX(DPO, beta 0.1) on Magpie-Pro, and 92.82% the mean of that figure over both data sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ogdopt_harness.analysis.comparison import ASKED, Comparison
from ogdopt_harness.analysis.tax import Interval
from ogdopt_harness.common.tables import NONE, Table, interval, listing, number, percent

BASELINE = "dpo_beta0.1"  # what the paper's reductions are against
TITLE = "Next to the paper's Table 1"


@dataclass(frozen=True)
class Reported:
    """One row of the table."""

    epoch: int
    arena_hard: Interval  # percent
    wildbench: Interval  # Elo
    tax: float  # percent


TABLE_1: dict[str, dict[str, Reported]] = {
    "magpie_air_gemma2": {
        "dpo_beta0.2": Reported(3, Interval(30.2, 27.82, 32.3), Interval(1134.79, 1121.15, 1146.72), -12.7355),
        "dpo_beta0.1": Reported(4, Interval(30.5, 28.44, 32.67), Interval(1136.45, 1124.85, 1147.87), -19.4960),
        "dpo_beta0.05": Reported(1, Interval(32.6, 31.13, 35.11), Interval(1142.00, 1127.45, 1153.95), -12.5871),
        "dpo_beta0.02": Reported(1, Interval(30.9, 29.1, 32.74), Interval(1132.48, 1119.39, 1149.92), -19.1050),
        "ogd": Reported(5, Interval(27.1, 24.56, 29.18), Interval(1122.92, 1111.20, 1135.67), -2.6340),
    },
    "magpie_pro": {
        "dpo_beta0.2": Reported(1, Interval(23.8, 22.02, 25.55), Interval(1142.27, 1131.90, 1152.78), -14.6284),
        "dpo_beta0.1": Reported(1, Interval(26.8, 24.98, 28.81), Interval(1138.75, 1127.15, 1151.52), -19.2612),
        "dpo_beta0.05": Reported(1, Interval(27.4, 25.49, 29.56), Interval(1141.01, 1128.93, 1151.62), -22.6019),
        "dpo_beta0.02": Reported(1, Interval(27.2, 24.9, 28.96), Interval(1138.17, 1122.19, 1152.72), -23.3374),
        "ogd": Reported(5, Interval(26.0, 24.03, 28.26), Interval(1124.37, 1108.08, 1137.55), -0.1638),
    },
}


def reduction(rows: Mapping[str, Reported], name: str = "ogd", baseline: str = BASELINE) -> float:
    """1 - TAX(name)/TAX(baseline), of the paper's figures."""
    return 1 - rows[name].tax / rows[baseline].tax


def comparable(a: Interval, b: Interval) -> bool:
    """Whether A is better than B, or their intervals overlap: the paper's definition (section 6)."""
    return a.value > b.value or a.high >= b.low


def win_rate(found: Comparison, name: str) -> Interval | None:
    """The run's judged win rate at its best epochs, percent; over seeds the mean, of the interval's ends too.

    The seeds answer the same prompts, so their errors do not average out as those of independent samples would.
    """
    rates = [point.win_rate for point in found.at(name, found.best)]
    known = [rate for rate in rates if rate is not None]
    if len(known) < len(rates) or not known:
        return None
    return Interval(*(100 * sum(ends) / len(known) for ends in zip(*known, strict=True)))


def beside(found: Comparison, data: str) -> Table:
    """Each run at its best epoch next to the paper's row of the same method and data set."""
    rows, way = [], found.ways[0] if found.ways else "direct"
    for name, theirs in TABLE_1[data].items():
        if name not in found.points:
            continue
        t, won = found.tax(name, found.best, way), win_rate(found, name)
        rows.append(
            [
                found.label(name),
                str(theirs.epoch),
                ", ".join(str(epoch) for epoch in found.best[name].values()),
                number(theirs.tax, 4, unit="%"),
                NONE if t is None else f"{number(t.value, 4, unit='%')} {interval(t.low, t.high)}",
                NONE if name == BASELINE else percent(reduction(TABLE_1[data], name), 2),
                _reduction(found, name, way),
                NONE if won is None else _interval(won, 1),
                _interval(theirs.arena_hard, 1),
                _interval(theirs.wildbench, 0),
            ]
        )
    columns = [
        "method",
        "best epoch, paper",
        "ours",
        "TAX, paper",
        f"ours, {ASKED.get(way, way)}",
        "less TAX than DPO β=0.1, paper",
        "ours, less TAX",
        "win rate, own judge",
        "Arena-Hard, paper",
        "WildBench Elo, paper",
    ]
    note = (
        "The paper's TAX has no interval; ours has the basic bootstrap's. Our reduction is given only where DPO β=0.1 forgot "
        "clearly: a ratio to noise says nothing. The win rate is that of `ogdopt judge`, against the baseline that it was "
        "given, and no Arena-Hard figure."
    )
    return Table(TITLE, columns, rows, note)


def _interval(value: Interval, digits: int) -> str:
    return f"{number(value.value, digits)} {interval(value.low, value.high, digits)}"


def _reduction(found: Comparison, name: str, way: str) -> str:
    contrast = found.contrast(name, BASELINE, way, found.best) if name != BASELINE and BASELINE in found.points else None
    share = contrast.reduction if contrast else None
    return NONE if share is None else f"{percent(share.value, 2)} {interval(100 * share.low, 100 * share.high, 1)}"


def verdicts(found: Comparison, data: str) -> Iterator[str]:
    """What the paper's definition of "comparable" makes of its own figures and of ours, in sentences."""
    rows, runs = TABLE_1[data], [name for name in TABLE_1[data] if name in found.points]
    if "ogd" not in runs:
        return
    others = [name for name in runs if name != "ogd"]
    columns: dict[str, dict[str, Interval | None]] = {
        "our judge's win rate": {name: win_rate(found, name) for name in runs},
        "the paper's Arena-Hard": {name: rows[name].arena_hard for name in runs},
        "the paper's WildBench": {name: rows[name].wildbench for name in runs},
    }
    for column, rates in columns.items():
        mine = rates["ogd"]
        known = {name: rate for name, rate in rates.items() if rate is not None and name in others}
        if mine is None or not known:
            continue
        alike = [name for name, rate in known.items() if comparable(mine, rate)]
        yield (
            f"By {column}, OGD is comparable (better, or overlapping 95% intervals) to "
            f"{listing([found.label(name) for name in alike]) or 'no DPO run'}"
            + (f", not to {listing([found.label(n) for n in known if n not in alike])}." if len(alike) < len(known) else ".")
        )
    share = reduction(rows)
    yield (
        f"The paper's TAX of OGD, {number(rows['ogd'].tax, 4, unit='%')}, is {percent(share, 2)} less than that of DPO β=0.1 "
        f"({number(rows[BASELINE].tax, 4, unit='%')})."
    )
