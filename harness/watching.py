"""What the 3D-properties of a study's runs were (`ogdopt.three_d`), as the report shows it; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from harness.analysis import Comparison
from harness.figures import Panel, logged
from harness.runs import Run
from harness.tables import NONE, Table, listing, spread

TITLE = "Drop, unlearning, dispersion"
COLUMNS = {
    "log gradient ratio": "3d/log_gradient_ratio",
    "share on the chosen": "3d/chosen_share",
    "chosen below peak": "3d/chosen_drop",
    "unseen since its least": "3d/unseen_change",
}


def three_d_table(found: Comparison) -> Table | None:
    """The measures after each run's last step, and what was warned of; None where no run was watched."""
    rows = []
    for name in found.points:
        runs = [seed.runs[name] for seed in found.study.seeds if name in seed.runs]
        values = {key: [run.series(key)[1][-1] for run in runs if run.series(key)[1]] for key in COLUMNS.values()}
        if not any(values.values()):
            continue
        cells = [spread(found, 2) for found in values.values()]
        rows.append([found.label(name), *cells, listing(list(dict.fromkeys(_warned(runs)))) or NONE])
    note = (
        "After the last step, on held-out pairs, nats a token. Log gradient ratio: how much more the loss's gradient acts on "
        "the rejected answers' probability than on the chosen's; above 0, and growing, the rejected drop. Share on the chosen: "
        "the same as a share; towards 0, training unlearns. Chosen below peak: what they have lost again. Unseen: growth of "
        "the probability of a next token that neither answer has where the two part. Warnings: drop, unlearning, degradation, "
        "dispersion, with the seeds' first steps; thresholds are preference.warn_at. The sentences are in complete.json."
    )
    return Table(TITLE, ["method", *COLUMNS, "warnings"], rows, note) if rows else None


def _warned(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        for kind, text in (run.complete.get("warnings") or {}).items():
            yield f"{kind} ({text.partition(':')[0]})"


def three_d_panels(runs: Mapping[str, Sequence[Run]]) -> Iterator[Panel]:
    """The course of the three properties."""
    yield Panel(
        "three_d",
        "The 3D-properties along every run",
        "On held-out pairs. Top: log of the gradient on the rejected over that on the chosen, per token; look for curves that "
        "run away upwards (drastic drop). Middle: how far the chosen are below their peak, nats a token; look for curves that "
        "leave 0 (unlearning). Bottom: probability that goes neither the chosen nor the rejected way where the two part; look "
        "for curves that rise (dispersion).",
        ylabels=["log gradient ratio", "chosen below peak", "unseen"],
        curves=[logged(runs, key) for key in ("3d/log_gradient_ratio", "3d/chosen_drop", "3d/unseen")],
        xlabel="optimizer step",
        markers=False,
    )
