"""From run directories to report.html, report.md, results.json and figures/: who forgot what, and how sure that is.

Everything is computed again from per-item outcomes and logged metrics; no model is loaded and torch is not imported.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np
import yaml
from rich.console import Console
from rich.text import Text

from ogdopt_harness.analysis.claims import Finished, finished
from ogdopt_harness.analysis.comparison import ASKED, HELPS, Comparison, Point, measure, results_of
from ogdopt_harness.analysis.headline import headline
from ogdopt_harness.analysis.paper import beside, verdicts
from ogdopt_harness.analysis.study_reader import Study, read_study
from ogdopt_harness.analysis.tax import Tax, wilson
from ogdopt_harness.common import keys
from ogdopt_harness.common.files import write_text
from ogdopt_harness.common.tables import (
    NONE,
    Table,
    cell_lines,
    extent,
    interval,
    markdown_text,
    number,
    p_text,
    percent,
    spread,
    tiny,
)
from ogdopt_harness.config.schema import ReportConfig
from ogdopt_harness.reporting.figures import Drawing, draw, looks, study_panels
from ogdopt_harness.reporting.joint import Joint, drawn, gap_table, joint_runs, numbers, sentences
from ogdopt_harness.reporting.stability import reward_models, steady_panels, steady_table, three_d_panels, three_d_table

TEMPLATES = Path(__file__).parent / "templates"
BEST, MATCHED = "Each run at its best epoch", "At matched preference learning"
PROMISE = "Does the step keep its promise?"
SUPERVISED = "supervised (the start)"
EASY, HARD = 0.97, 0.85  # outside, a benchmark hides early forgetting, or its ratio is mostly noise


@dataclass(frozen=True, eq=False)
class Report:
    """What was found, and where it was written."""

    found: Comparison
    settings: ReportConfig
    headline: list[str]
    tables: list[Table]
    drawings: list[Drawing]
    studies: list[Finished]
    """Finished studies of papers, in or next to the directory."""
    joint: Joint | None = None
    """What runs on two objectives reached."""

    def page(self, study: Finished) -> str:
        """Where a study's page lies, as seen from the report."""
        return quote(Path(os.path.relpath(study.page, self.found.study.directory)).as_posix())

    @property
    def path(self) -> Path:
        """The HTML report."""
        return self.found.study.folder.page

    def table(self, title: str) -> Table | None:
        """The table of this title."""
        return next((table for table in self.tables if table.title == title), None)


def write_report(study_dir: str | Path, settings: ReportConfig | None = None) -> Report:
    """Compute everything from `study_dir` and write report.html, report.md, results.json and figures/ there.

    `settings` (bootstrap draws, confidence) are by default those of the study's config.yaml. Raises ValueError where
    there is nothing to compare, or where models answered different questions.
    """
    study = read_study(study_dir)
    settings = settings or settings_of(study)
    found = measure(study, settings.samples, settings.confidence)
    joint = joint_runs(study)
    report = Report(
        found,
        settings,
        [
            *headline(found),
            *(verdicts(found, settings.paper) if settings.paper else ()),
            *(sentences(joint) if joint else ()),
        ],
        [
            t.without_empty_columns()
            for t in (
                *([beside(found, settings.paper)] if settings.paper else ()),
                *([gap_table(joint)] if joint else ()),
                *tables(found),
            )
        ],
        _figures(found, study.folder.figures, joint=joint),
        finished(study.directory),
        joint,
    )
    results = json.dumps(_results(report), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(study.folder.results, results + "\n")
    write_text(study.folder.text, _markdown(report))
    write_text(report.path, _html(report))
    return report


def print_table(report: Report, console: Console | None = None) -> None:
    """Print the comparison on the terminal, what it says, and where the whole report lies."""
    console = console or Console()
    _short_table(report.found).without_empty_columns().show(console)
    for sentence in [*report.headline, *(f"Left out: {line}" for line in report.found.study.incomplete)]:
        console.print(Text(f"• {sentence}"))
    console.print(Text(f"Report: {report.path}", style="bold"), soft_wrap=True)


def print_gaps(joint: Joint, page: Path, console: Console | None = None) -> None:
    """Print what joint runs reached, for a study that has nothing else to report, and where its page lies."""
    console = console or Console()
    gap_table(joint).without_empty_columns().show(console)
    for sentence in sentences(joint):
        console.print(Text(f"• {sentence}"))
    console.print(Text(f"Page: {page}", style="bold"), soft_wrap=True)


def _short_table(found: Comparison) -> Table:
    """The comparison in 80 columns: preference learning at the best epoch, TAX there and at matched preference learning."""
    rows = []
    for name in found.points:
        points, matched = found.at(name, found.best), found.tax(name, found.matched, "direct")
        taxes = [found.tax(name, found.matched, way) for way in ("cloze", "generate")]
        at_best = found.tax(name, found.best, "direct")
        rows.append(
            [
                found.label(name),
                ",".join(str(p.epoch) for p in points),
                *(percent(_mean([getattr(p, key) for p in points]), 0) for key in ("style", "accuracy")),
                NONE if at_best is None else number(at_best.value),
                NONE if matched is None else f"{number(matched.value)} {interval(matched.low, matched.high, 1)}",
                *(NONE if t is None else number(t.value) for t in taxes),
            ]
        )
    columns = ["", "best\nepoch", "style\nrate", "pairs\nright", "TAX", "TAX at matched\npreference", "by\ncloze", "by\nreply"]
    title = f"TAX in percent (0 = nothing forgotten), {len(found.references)} seed{'s' if len(found.references) > 1 else ''}"
    return Table(title, columns, rows, strong=frozenset(row - 1 for row in _strong(found)))


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def settings_of(study: Study) -> ReportConfig:
    """How a study's own configuration wants its report."""
    config = study.config.get("config", study.config)
    known = config.get("report") or {}
    return ReportConfig(**{key: known[key] for key in ("samples", "confidence", "paper") if key in known})


def tables(found: Comparison) -> Iterator[Table]:
    """Every table of the report, in order."""
    yield _best_table(found)
    if found.criterion is not None:
        yield _matched_table(found)
    yield _supervised_table(found)
    for way in found.ways:
        yield _task_table(found, way)
    if any(found.promises(name) for name in found.points):
        yield _promise_table(found)
    if (watched := three_d_table(found)) is not None:
        yield watched
    if (steady := steady_table(found)) is not None:
        yield steady
    yield _cost_table(found)


def _tax_cell(t: Tax | None) -> str:
    if t is None:
        return NONE
    return f"{number(t.value, unit='%')} {interval(t.low, t.high)}{extent(t.seeds)}"


def _style_cell(points: Sequence[Point], confidence: float) -> str:
    if not points or any(p.style is None or not p.style_n for p in points):
        return NONE
    n = sum(p.style_n for p in points)
    _, low, high = wilson(round(sum((p.style or 0) * p.style_n for p in points)), n, confidence)
    rates = [100 * p.style for p in points if p.style is not None]
    return f"{number(sum(rates) / len(rates), 1, unit='%')} {interval(100 * low, 100 * high, 1)}{extent(rates, 1)}"


def _learned_cells(points: Sequence[Point], confidence: float) -> list[str]:
    return [
        ", ".join(str(p.epoch) for p in points),
        _style_cell(points, confidence),
        spread([p.accuracy for p in points], 1, scale=100, unit="%"),
    ]


def _confidence(found: Comparison) -> float:
    return next(
        (t.confidence for seeds in found.points.values() for c in seeds.values() for p in c.values() for t in p.tax.values()),
        0.95,
    )


def _best_table(found: Comparison) -> Table:
    confidence = _confidence(found)
    rows = [[SUPERVISED, NONE, _start_style(found, confidence), *[NONE] * 9]]
    for name in found.points:
        points = found.at(name, found.best)
        t = found.tax(name, found.best, "direct")
        rows.append(
            [
                found.label(name),
                *_learned_cells(points, confidence),
                spread([p.win_rate and p.win_rate.value for p in points], 1, scale=100, unit="%"),
                spread([p.chosen_change for p in points], sign=True),
                spread([p.rejected_change for p in points], sign=True),
                _tax_cell(t),
                NONE if t is None else f"{number(t.null_mean, unit='%')} ({p_text(t.p_value)})",
                NONE if t is None else f"{number(t.signed, sign=True, unit='%')} ± {number(t.signed_se)}",
                *(_tax_cell(found.tax(name, found.best, way)) for way in ("cloze", "generate")),
            ]
        )
    columns = [
        "method",
        "best epoch",
        "style rate",
        "preference accuracy",
        "win rate",
        "Δ log-prob chosen",
        "Δ log-prob rejected",
        "TAX",
        "null mean (p)",
        "signed change",
        "TAX cloze",
        "TAX generate",
    ]
    chosen = "The last epoch (preference learning was not measured)"
    if found.criterion is not None:
        chosen = f"The best epoch has the highest {found.criterion} (then preference accuracy, then the earlier one)"
    note = (
        f"{chosen}. TAX in percent, 0 = nothing forgotten, with {percent(confidence, 0)} intervals for the chance of test "
        "items; they correct TAX's bias, so may lie above a TAX near 0, and reach 0 where p cannot exclude it. "
        "Null mean: what two equally good models score; p: how often they score this low. Signed change: the same without "
        "hiding gains, ± standard error. "
        "Δ log-prob: change since the start on held-out pairs, nats a token." + _seeds_note(found)
    )
    return Table(BEST, columns, rows, note, strong=_strong(found))


def _seeds_note(found: Comparison) -> str:
    return " Means over seeds, in brackets the lowest and highest seed." if len(found.references) > 1 else ""


def _strong(found: Comparison) -> frozenset[int]:
    """Rows of OGD, below the supervised model's."""
    return frozenset(i for i, name in enumerate(found.points, start=1) if found.study.runs[name].method == "ogd")


def _start_style(found: Comparison, confidence: float) -> str:
    starts = [ref.style for ref in found.references.values()]
    if any(s is None for s in starts):
        return NONE
    return _style_cell([Point(0, s["chosen_rate"], s["n"], None, None, None, {}, None) for s in starts if s], confidence)


def _matched_table(found: Comparison) -> Table:
    confidence = _confidence(found)
    mine = next((name for name in found.points if found.study.runs[name].method == "ogd"), None)
    rows = []
    for name in found.points:
        contrast = found.contrast(mine, name, found.ways[0]) if mine and name != mine and found.ways else None
        cells = [_tax_cell(found.tax(name, found.matched, way)) for way in ("direct", "cloze", "generate")]
        against = NONE if contrast is None else f"{number(contrast.value, sign=True)} {interval(contrast.low, contrast.high)}"
        verdict = "" if contrast is None else " (clear)" if contrast.clear else " (noise)"
        rows.append([found.label(name), *_learned_cells(found.at(name, found.matched), confidence), *cells, against + verdict])
    columns = ["method", "epoch", "style rate", "preference accuracy", "TAX", "TAX cloze", "TAX generate"]
    levels = ", ".join(
        f"{percent(level)}" + (f" (seed {seed})" if len(found.levels) > 1 else "") for seed, level in found.levels.items()
    )
    note = (
        f"A run that learned less also forgets less; so each run is taken at the first epoch whose {found.criterion} reaches "
        f"the highest level that all of them reach: {levels}. Last column: OGD's TAX minus this run's, in points; positive: "
        "OGD forgot less; clear: the interval leaves 0 out and all seeds agree." + _seeds_note(found)
    )
    strong = frozenset(row - 1 for row in _strong(found))
    return Table(MATCHED, [*columns, "OGD minus this"], rows, note, strong=strong)


def _supervised_table(found: Comparison) -> Table:
    references = list(found.references.values())
    names = list(dict.fromkeys(name for ref in references for name in ref.tasks))
    ways = list(dict.fromkeys(way for ref in references for way in ref.ways))
    rows = []
    for name in names:
        asked = {way: [ref.tasks[name][way] for ref in references if way in ref.tasks.get(name, {})] for way in ways}
        first = next(answers[0] for answers in asked.values() if answers)
        margins = [float(a.margins.mean()) for a in asked.get("direct", ()) if a.margins is not None]
        flags: dict[str, list[str]] = {}
        for way, answers in asked.items():
            for flag in dict.fromkeys(_flags(answers)):
                flags.setdefault(flag, []).append(way)
        rows.append(
            [
                name,
                references[0].families.get(name, ""),
                str(len(first.outcomes)),
                percent(first.chance, 0),
                *(spread([a.accuracy for a in asked[way]], 1, scale=100, unit="%") for way in ways),
                spread(margins),
                "; ".join(f"{flag}: {', '.join(flagged)}" for flag, flagged in flags.items()),
            ]
        )
    note = (
        f"The model that TAX compares with. Above {percent(EASY, 0)} a benchmark hides early forgetting; below "
        f"{percent(HARD, 0)} its relative change is noisy, and near chance it cannot show forgetting. Margin: log-prob of the "
        "right choice minus the best wrong one, nats." + _seeds_note(found)
    )
    return Table("The supervised model", ["benchmark", "family", "n", "chance", *ways, "margin", "look out"], rows, note)


def _flags(answers: Sequence[Any]) -> Iterator[str]:
    for a in answers:
        noise = 2 * (a.accuracy * (1 - a.accuracy) / len(a.outcomes)) ** 0.5
        if a.accuracy == 0 or a.accuracy - a.chance < noise:
            yield "near chance, cannot show forgetting"
        elif a.accuracy > EASY:
            yield f"above {percent(EASY, 0)}, hides early forgetting"
        elif a.accuracy < HARD:
            yield f"below {percent(HARD, 0)}"


def _task_table(found: Comparison, way: str) -> Table:
    taxes = {name: found.tax(name, found.best, way) for name in found.points}
    present = {name: t for name, t in taxes.items() if t is not None}
    tasks = list(dict.fromkeys(task for t in present.values() for task in t.tasks))
    rows = []
    for task in tasks:
        changes = [t.tasks.get(task) for t in present.values()]
        first = next(c for c in changes if c is not None)
        cells = [NONE if c is None else f"{percent(c.q)} (−{c.lost} +{c.gained})" for c in changes]
        rows.append([task, str(first.n), percent(first.p), *cells])
    note = "Accuracy of each run at its best epoch; in brackets the items it lost and gained against the supervised model." + (
        " Accuracies are means over seeds, items are counted over all seeds." if len(found.references) > 1 else ""
    )
    columns = ["benchmark", "n", "supervised", *(found.label(name) for name in present)]
    return Table(f"Per benchmark, {ASKED.get(way, way)}", columns, rows, note, folded=way != found.ways[0])


def _promise_table(found: Comparison) -> Table:
    confidence = _confidence(found)
    rows = []
    for name in found.points:
        promises, points = found.promises(name), found.at(name, found.best)
        if not promises:
            continue
        rows.append(
            [
                found.label(name),
                spread([p.steps for p in promises], 0),
                spread([p.chosen_missed for p in promises], 1, scale=100, unit="%"),
                spread([p.rejected_helped for p in promises], 1, scale=100, unit="%"),
                tiny(max(p.worst_chosen for p in promises)),
                tiny(min(p.worst_rejected for p in promises)),
                spread([p.passes for p in promises], 1),
                _tax_cell(found.tax(name, found.best, "direct")),
                _style_cell(points, confidence),
                spread([p.margin for p in points], sign=True),
            ]
        )
    columns = [
        "method",
        "steps",
        "did not help chosen",
        "helped rejected",
        "worst cosine, chosen",
        "worst cosine, rejected",
        "further passes",
        "TAX",
        "style rate",
        "reward margin",
    ]
    note = (
        "OGD promises of every step that the chosen's loss falls and the rejected's does not. Here the change of the "
        "parameters is judged, to first order, on the step's own batch. If its cosine with the chosen's gradient is not below "
        f"0, the step did not help chosen. If its cosine with the rejected's is below {tiny(HELPS)}, it helped rejected. "
        "Rounding of the parameters to float32 stays above that. Steps: those logged that moved anything. Further passes: "
        "over the gradients, a step. TAX, style rate and held-out reward margin are of the run's best epoch."
        + _seeds_note(found)
        + " Look for shares of 0% in the optimizer's metric, and for how often the same optimizer breaks the promise without "
        "it. TAX, style rate and margin of the two say whether a kept promise is worth its passes."
    )
    return Table(PROMISE, columns, rows, note)


def _cost_table(found: Comparison) -> Table:
    def seconds(values: Sequence[float | None]) -> str:
        return spread(values, 0, unit=" s")

    rows = [["supervised stage", *_training([s.supervised for s in found.study.seeds if s.supervised]), NONE, NONE]]
    for name, seeds in found.points.items():
        runs = [s.runs[name] for s in found.study.seeds if name in s.runs]
        evaluating = [sum(p.seconds or 0.0 for p in curve.values()) or None for curve in seeds.values()]
        speeds = [float(np.median(values)) for run in runs if (values := run.series(keys.SPEED)[1])]
        rows.append([found.label(name), *_training([run.complete for run in runs]), seconds(evaluating), spread(speeds, 0)])
    columns = ["stage", "seeds", "steps", "epochs", "training", "evaluation", "tokens a second"]
    return Table("What it cost", columns, rows, "Wall-clock seconds a seed." + _seeds_note(found))


def _training(completes: Sequence[Mapping[str, Any]]) -> list[str]:
    steps, epochs = ([c.get(key) for c in completes] for key in ("steps", "epochs"))
    return [
        str(len(completes)),
        spread(steps, 0),
        spread(epochs, 0),
        spread([c.get("seconds") for c in completes], 0, unit=" s"),
    ]


def _figures(found: Comparison, folder: Path, suffix: str = ".svg", joint: Joint | None = None) -> list[Drawing]:
    runs = {name: [s.runs[name] for s in found.study.seeds if name in s.runs] for name in found.points}
    points = {
        name: [[_measurements(found, p) for p in curve.values()] for curve in seeds.values()]
        for name, seeds in found.points.items()
    }
    floors = {}
    for way in found.ways:
        nulls = [t.null_mean for name in found.points if (t := found.tax(name, found.best, way)) is not None]
        floors[way] = float(np.mean(nulls))
    panels = study_panels(runs, points, floors, list(found.levels.values()), found.criterion or "preference learning")
    of_joint = draw(folder, *drawn(joint), suffix) if joint else []
    own = draw(folder, [*panels, *three_d_panels(runs)], looks(found.study.runs), suffix)
    if models := reward_models(found):
        look = looks(found.study.runs | {name: seeds[0] for name, seeds in models.items()})
        own += draw(folder, steady_panels(runs | models), look, suffix)
    return of_joint + own


def _measurements(found: Comparison, p: Point) -> dict[str, float | None]:
    taxes = {f"tax/{way}": t.value for way, t in p.tax.items()}
    return {"epoch": p.epoch, "skill": p.skill(found.criterion), "chosen_change": p.chosen_change, **taxes}


def _how(study: Study) -> dict[str, str]:
    """What the study's config.yaml says about how it was run, apart from the configuration itself."""
    facts: dict[str, str] = {}
    for key, value in study.config.items():
        if key == "config" or value is None or ("config" not in study.config and isinstance(value, dict) and key != "versions"):
            continue
        facts[key] = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    return facts


def _configuration(study: Study) -> str:
    return yaml.safe_dump(study.config.get("config", study.config), sort_keys=False, allow_unicode=True)


def _html(report: Report) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )

    def inlined(drawing: Drawing) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(drawing.file.read_bytes()).decode("ascii")

    environment.filters["cell_lines"] = cell_lines
    found = report.found
    return environment.get_template("report.html.j2").render(
        name=found.study.directory.name,
        report=report,
        found=found,
        inlined=inlined,
        how=_how(found.study),
        configuration=_configuration(found.study),
    )


def _markdown(report: Report) -> str:
    study = report.found.study
    parts = [f"# {markdown_text(study.directory.name)}: what was forgotten"]
    parts.append("\n".join(f"- {markdown_text(sentence)}" for sentence in report.headline))
    for title, lines in (("Left out, not finished", study.incomplete), ("Warnings", report.found.warnings)):
        if lines:
            parts += [f"## {title}", "\n".join(f"- {markdown_text(line)}" for line in lines)]
    for table in report.tables:
        parts += [f"## {markdown_text(table.title)}", table.markdown(), markdown_text(table.note)]
    parts.append("## Figures")
    for drawing in report.drawings:
        parts += [f"### {markdown_text(drawing.title)}", f"![{markdown_text(drawing.title)}](figures/{drawing.file.name})"]
        parts.append(markdown_text(drawing.caption))
    for paper in report.studies:
        title = markdown_text(f"Study {paper.name}: {paper.title}")
        parts += [f"## {title}", paper.table.markdown(), f"{paper.table.note} [The whole study]({report.page(paper)})"]
    parts += ["## How it was run", "\n".join(f"- {markdown_text(f'{k}: {v}')}" for k, v in _how(study).items())]
    parts.append("The configuration is in `config.yaml`, all numbers are in `results.json`.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _results(report: Report) -> dict[str, Any]:
    settings = {"samples": report.settings.samples, "confidence": report.settings.confidence}
    joint = {"joint": numbers(report.joint)} if report.joint else {}
    return {"headline": report.headline, **settings, **results_of(report.found), **joint}
