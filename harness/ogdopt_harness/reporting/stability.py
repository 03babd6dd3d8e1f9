"""What "3D-properties" looks at in a study's runs: these properties (`ogdopt.three_d`), and how steady reward models are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ogdopt_harness.analysis.comparison import Comparison
from ogdopt_harness.analysis.study_reader import Run
from ogdopt_harness.common import keys
from ogdopt_harness.common.tables import NONE, Table, listing, spread
from ogdopt_harness.reporting.figures import Panel, logged

TITLE = "Drop, unlearning, dispersion"
COLUMNS = {
    "log gradient ratio": keys.GRADIENT_RATIO,
    "share on the chosen": keys.CHOSEN_SHARE,
    "chosen below peak": keys.CHOSEN_DROP,
    "unseen since its least": keys.UNSEEN_CHANGE,
}


def three_d_table(found: Comparison) -> Table | None:
    """The measures after each run's last step, and what was warned of; None where no run was watched."""
    rows = []
    for name in found.points:
        runs = [seed.runs[name] for seed in found.study.seeds if name in seed.runs]
        values = {key: [run.series(key)[1][-1] for run in runs if run.series(key)[1]] for key in COLUMNS.values()}
        if not any(values.values()):
            continue
        cells = [spread(last, 2) for last in values.values()]
        rows.append([found.label(name), *cells, listing(list(dict.fromkeys(_warned(runs)))) or NONE])
    note = (
        "After the last step, on held-out pairs, nats a token. Log gradient ratio: how much more the gradient of a loss with "
        "equal weights, as DPO's, acts on the rejected answers' probability than on the chosen's; above 0, and growing, the "
        "rejected drop. Share on the chosen: the same as a share; towards 0, training unlearns. Chosen below peak: what they "
        "have lost again. Unseen: growth of the probability of a next token that neither answer has where the two part. "
        "Warnings: drop, unlearning, degradation, dispersion, with the seeds' first steps; thresholds are preference.warn_at. "
        "The sentences are in complete.json."
    )
    return Table(TITLE, ["method", *COLUMNS, "warnings"], rows, note) if rows else None


def _warned(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        for kind, text in (run.complete.get(keys.WARNINGS) or {}).items():
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
        curves=[logged(runs, key) for key in (keys.GRADIENT_RATIO, keys.CHOSEN_DROP, keys.UNSEEN_MASS)],
        xlabel="optimizer step",
        markers=False,
    )


STEADY = "How steadily held-out pairs are ordered"


def reward_models(found: Comparison) -> dict[str, list[Run]]:
    """The finished reward models, a run a seed."""
    models: dict[str, list[Run]] = {}
    for seed in found.study.seeds:
        for name, run in seed.rewards.items():
            models.setdefault(name, []).append(run)
    return models


def steady_table(found: Comparison) -> Table | None:
    """Held-out accuracy at the end, and how much it wavers; None without a reward model to compare with."""
    models = reward_models(found)
    if not models:
        return None
    policies = {name: [seed.runs[name] for seed in found.study.seeds if name in seed.runs] for name in found.points}
    rows = []
    for name, runs in (models | policies).items():
        series = [values for run in runs if (values := run.series(keys.measured(keys.ACCURACIES))[1])]
        if series:
            late = [float(np.std(values[len(values) // 2 :])) for values in series]
            cells = [
                spread([v[-1] for v in series], 1, scale=100, unit="%"),
                spread([max(v) for v in series], 1, scale=100, unit="%"),
            ]
            label = runs[0].label if name in models else found.label(name)
            rows.append([label, *cells, spread(late, 2, scale=100)])
    note = (
        "Share of held-out pairs whose chosen answer scores higher: by the reward model, and by the implicit reward of the "
        "others (the change of log-probability since the start). Wavering: standard deviation over the last half of training, "
        "in points. The paper finds the reward model's steady and DPO's not (figure 4)."
    )
    return Table(STEADY, ["method", "at the end", "best", "wavering"], rows, note)


def steady_panels(runs: Mapping[str, Sequence[Run]]) -> Iterator[Panel]:
    """Figure 4 of "3D-properties"; `runs` are policies and reward models."""
    yield Panel(
        "pairs_ordered",
        "Held-out pairs ordered rightly, reward model and policies",
        "Look for a reward model whose curve is smooth where those of DPO waver or fall in later epochs.",
        ylabels=["share of pairs"],
        curves=[logged(runs, keys.measured(keys.ACCURACIES))],
        xlabel="optimizer step",
        markers=False,
    )
