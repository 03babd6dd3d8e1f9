"""What a study's numbers say, in sentences that are computed: also where that is "noise", or that another method won."""

from __future__ import annotations

from collections.abc import Iterator

from ogdopt_harness.analysis.comparison import ASKED, STYLE, Comparison
from ogdopt_harness.analysis.tax import Tax
from ogdopt_harness.common.keys import SKIPPED_STEPS, STEPS
from ogdopt_harness.common.tables import interval, listing, number, p_text, percent


def headline(found: Comparison) -> list[str]:
    """What the numbers say, in sentences: computed, also where the answer is 'noise' or 'another method won'."""
    if not found.ways:
        return [*_skipped(found), "No TAX could be computed; see the warnings."]
    return [
        *_skipped(found),
        *_who_won(found, found.ways[0]),
        *_noise(found, found.ways[0]),
        *_other_ways(found),
        *_doubts(found),
    ]


def _skipped(found: Comparison) -> Iterator[str]:
    """Steps that did nothing, of each run that has such."""
    for seed in found.study.seeds:
        runs = [("SFT", seed.supervised), *((found.label(name), run.complete) for name, run in seed.runs.items())]
        for label, complete in runs:
            if skipped := complete.get(SKIPPED_STEPS):
                yield (
                    f"{label}, seed {seed.seed}: {skipped} of {complete.get(STEPS)} steps were skipped, since their gradients "
                    "were not finite."
                )


def _setting(found: Comparison) -> str:
    if found.criterion is None:
        return "At the last epoch (preference learning was not measured, so this is not a fair comparison)"
    levels = listing([percent(level) for level in found.levels.values()])
    return f"At matched preference learning ({found.criterion} at least {levels}{', by seed' if len(found.levels) > 1 else ''})"


def _scored(found: Comparison, name: str, t: Tax) -> str:
    return f"{found.label(name)} (TAX {number(t.value, unit='%')} {interval(t.low, t.high)})"


def _least(found: Comparison, way: str) -> str:
    (winner, t), *others = found.ranking(way)
    alike = [found.label(name) for name, _ in others if (c := found.contrast(winner, name, way)) is None or not c.clear]
    noise = f"; within noise of it: {listing(alike)}" if alike else ""
    if not others:
        return f"the only run, {_scored(found, winner, t)}"
    return f"{_scored(found, winner, t)} forgot least{noise}"


def _who_won(found: Comparison, way: str) -> Iterator[str]:
    ranking = found.ranking(way)
    ranked = dict(ranking)
    yield f"{_setting(found)}, {ASKED.get(way, way)}: {_least(found, way)}."
    runs = found.study.runs
    ogd, dpo, winners = ([name for name, _ in ranking if runs[name].method == m] for m in ("ogd", "dpo", "sft"))
    for mine in ogd[:1]:
        if dpo:
            yield _against(found, mine, dpo[0], way, "every DPO run; against the mildest" if len(dpo) > 1 else "DPO; against")
        if winners:
            yield _against(found, mine, winners[0], way, "training on chosen alone,")
        t = ranked[mine]
        noise = "no more than" if not t.detectable else "more than"
        yield (
            f"{found.label(mine)} lost {noise} what two equally good models seem to lose by chance "
            f"(they score {number(t.null_mean, unit='%')} on average; {p_text(t.p_value)})."
        )


def _against(found: Comparison, mine: str, other: str, way: str, whom: str) -> str:
    contrast = found.contrast(mine, other, way)
    if contrast is None:
        return f"{found.label(mine)} and {found.label(other)} share no finished seed, so they cannot be compared."
    if not contrast.clear:
        return f"{found.label(other)} does as well as {found.label(mine)}, within noise: {found.label(mine)} scores {contrast}."
    if contrast.value < 0:
        return f"{found.label(mine)} does not win: {found.label(other)} forgot less; {found.label(mine)} scores {contrast}."
    text = f"{found.label(mine)} forgot less than {whom} ({found.label(other)}) by {contrast}"
    share = contrast.reduction
    if share is None:
        return f"{text}."
    return (
        f"{text}; that is {percent(share.value)} less {interval(100 * share.low, 100 * share.high, 1)}, where a model that "
        f"forgot nothing would show {percent(share.ceiling)} on average."
    )


def _noise(found: Comparison, way: str) -> Iterator[str]:
    taxes = {name: t for name in found.points if (t := found.tax(name, found.best, way)) is not None}
    silent = {name: t for name, t in taxes.items() if not t.detectable}
    if silent:
        nulls = [t.null_mean for t in silent.values()]
        floor = number(sum(nulls) / len(nulls), unit="%")
        yield (
            f"Inside the noise floor at the best epoch: {listing([found.label(name) for name in silent])}. Two equally good "
            f"models score {floor} there; no forgetting was detected, and no ratio to these TAX values means anything."
        )


def _other_ways(found: Comparison) -> Iterator[str]:
    for way in found.ways[1:]:
        yield f"The same models {ASKED.get(way, way)}: {_least(found, way)}."


def _doubts(found: Comparison) -> Iterator[str]:
    weak: dict[int, str] = {}
    for seed, level in found.levels.items():
        start = (found.references[seed].style or {}).get("chosen_rate") if found.criterion == STYLE else 0.5
        if level < max(0.5, start or 0.0):
            tops = {name: found.points[name][seed][epochs[seed]] for name, epochs in found.best.items() if seed in epochs}
            weak[seed] = min(tops, key=lambda name, tops=tops: tops[name].skill(found.criterion) or 0.0)
    if weak:
        slowest = listing(list(dict.fromkeys(found.label(name) for name in weak.values())))
        yield (
            f"The matched level is low because {slowest} hardly learned the preference"
            f"{'' if len(found.levels) == 1 else f' (seed {listing([str(s) for s in weak])})'}: "
            "compare the runs at their best epochs too."
        )
    if len(found.shared_seeds) < len(found.references):
        shared = listing([str(seed) for seed in found.shared_seeds])
        yield (
            f"Not every run is finished in every seed; runs are ranked over seed {shared}, the tables hold all finished runs."
            if shared
            else "No seed has every run finished: the means are over different seeds, so their order may be chance."
        )
    if len(found.references) == 1:
        yield "One seed: the intervals hold the chance of the test items, not that of training again."
