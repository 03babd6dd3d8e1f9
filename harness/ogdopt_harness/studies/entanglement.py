"""Gradient entanglement: why both log-likelihoods move together, on answers that differ in one token.

Three parts, on one small model that is pretrained for it (`studies/sentiment_lab.py`): DPO on four styles of answers; all
losses side by side; the rules for two gradients, from leaving the chosen alone to leaving the rejected alone; and
sparse preference optimization.
After sections 3 to 5 and figures 2 to 4 of the paper "gradient entanglement".
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ogdopt.losses import LOSSES
from ogdopt.projection import interval, normalized, orthogonal
from ogdopt_harness.analysis.claims import Claim, Findings, Picture
from ogdopt_harness.common.tables import Table, number
from ogdopt_harness.studies.entanglement_lab import BATCH, LENGTH, MEASURED, RATE, STEPS, WALK, Course, Runs
from ogdopt_harness.studies.sentiment_lab import FILE, STYLES, Sentiment, load, pretrained
from ogdopt_harness.training.methods import METHODS

UP, DOWN = ("CPO", "DPOP", "RRHF", "SLiC-HF"), ("DPO", "R-DPO", "SimPO", "IPO")
"""Losses of which the paper's figure 2 shows that the chosen rise, and that both fall."""
NAMES = [name for name, method in METHODS.items() if method.loss == name and name in LOSSES]
"""Every loss of pairs of answers."""
RULES = {"OGD (t=1)": orthogonal, "NPO (t=0.5)": normalized} | {f"interval t={t:g}": interval(t) for t in (0, 0.25, 0.75)}


def study(seeds: Sequence[int] = (0, 1, 2, 3, 4), data_dir: str | None = None) -> Findings:
    """All three parts for each seed; the pretrained model is one for all.

    Args:
        seeds: Seeds of the supervised stage's rows and of the order of pairs.
        data_dir: Folder with sentiment/tweet_sentiment_train.jsonl.gz, rows {text, label_text}; without it they are generated.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same figures where versions and the processor's instruction set are the same
    try:
        data = Sentiment(load(data_dir))
        base = pretrained(data)
        styles, angles, maps, losses, rules = [], [], [], [], []
        for seed in seeds:
            runs = Runs(base, data, seed)
            done = {style: runs.tuned_by_dpo(style) for style in STYLES}
            styles.append({style: found[0] for style, found in done.items()})
            angles.append({style: found[1] for style, found in done.items()})
            maps.append({style: runs.tokens(style) for style in STYLES})
            losses.append({METHODS[name].label: runs.of_loss(name) for name in NAMES})
            mixed = {name: runs.of_rule(rule) for name, rule in RULES.items()}
            alone = {"NPO, each pair": runs.of_pairs(), "Sparse DPO": runs.of_sparse()}
            rules.append({"DPO": losses[-1]["DPO"]} | mixed | alone)
    finally:
        torch.set_num_threads(threads)
    told = f"Data: tweets of {data_dir}." if data_dir else f"Generated data: --data_dir FOLDER reads tweets ({FILE})."
    sizes = f"{len(data.words):,} words, {sum(p.numel() for p in base.parameters()):,} parameters"
    return Findings(
        seeds,
        [*style_claims(styles, angles, maps), *loss_claims(losses), *rule_claims(rules)],
        [style_table(styles, angles), course_table("All losses", losses, told=True), course_table("Rules and sparse", rules)],
        [
            Picture("styles", "Look for chosen that fall, and lower the longer the suffix.", draw_styles(styles)),
            Picture("tokens", "Look for a cold cell where the two labels meet, on a warm diagonal.", draw_tokens(maps)),
            Picture("losses", "Look for pairs of bars on one side of zero: both moved alike.", draw_bars(losses)),
            Picture("rules", "Look for chosen bars above zero next to rejected bars that are not.", draw_bars(rules)),
        ],
        [
            told,
            f"One small model ({sizes}) instead of GPT-2, pretrained on the labels of such text in many words. "
            "Answers have no end token. Settings were chosen on seeds 0 and 1, by the cosines at the start and by how far the "
            "first part moves.",
            "The answers of a pair are equally long, so that R-DPO is DPO here.",
            f"First part: AdamW with rate {RATE}, {STEPS} steps of {BATCH} pairs. Others: {WALK} steps of length {LENGTH} "
            "along the gradient itself, where the conditions are exact to first order.",
        ],
        {"losses": summary(losses), "rules": summary(rules), "cosines": angles, "styles": summary(styles)},
    )


def summary(found: Sequence[dict[str, Course]]) -> list[dict[str, Any]]:
    """What study.json keeps of courses."""
    return [{name: {"changes": c.changes[-1], "tax": c.forgotten} for name, c in one.items()} for one in found]


def style_claims(
    styles: Sequence[dict[str, Course]], angles: Sequence[dict[str, list[float]]], maps: Sequence[dict[str, np.ndarray]]
) -> list[Claim]:
    """Figures 3 and 4."""
    ends = [{style: course.changes[-1][0] for style, course in one.items()} for one in styles]
    single, short, long, both = ([one[style] for one in ends] for style in STYLES)
    gaps = [x - y for x, y in zip(short, long)]
    starts = [[one[style][0] for style in STYLES] for one in angles]
    label = 3  # the label's place in the style with a prefix
    maps_of = [one["prefix and suffix"] for one in maps]
    conflict = [m[label, label] for m in maps_of]
    rest = [np.delete(m.diagonal(), label).mean() for m in maps_of]
    return [
        Claim("single token: change of the chosen's log-probability", "rises (figure 3)", single, [x > 0 for x in single]),
        Claim("long suffix: change of the chosen's", "falls (figure 3)", long, [x < 0 for x in long]),
        Claim("prefix and suffix: change of the chosen's", "falls (figure 3)", both, [x < 0 for x in both]),
        Claim("the longer suffix falls more: short less long", "falls more (figure 3)", gaps, [x > 0 for x in gaps]),
        Claim("cosine at the start, single token", "below 0 (figure 4a)", [x[0] for x in starts], [x[0] < 0 for x in starts]),
        Claim("cosine at the start grows with the length: least increase from style to style", "grows (figure 4a)",
              [min(np.diff(x)) for x in starts], [bool(min(np.diff(x)) > 0) for x in starts]),
        Claim("token by token: cosine where the labels meet", "below 0 (figure 4b)", conflict, [x < 0 for x in conflict]),
        Claim("token by token: mean cosine of the tokens that both answers share", "far above 0, near 1 (figure 4b)",
              rest, [x > 0.5 for x in rest]),
    ]  # fmt: skip


def loss_claims(losses: Sequence[dict[str, Course]]) -> list[Claim]:
    """Condition 2, Table 1 and figure 2."""
    told = [statistics.fmean(x for course in one.values() for x in course.told) for one in losses]
    cases = [statistics.fmean(p == o for course in one.values() for p, o in course.cases) for one in losses]
    margins = [min(a - b for a, b in one["DPO"].batches) for one in losses]
    found = [
        Claim("share of steps whose two directions the condition told rightly", "exact to first order (condition 2)",
              told, [x > 0.9 for x in told]),
        Claim("share of steps whose case of Table 1 was the predicted one", "exact to first order (Table 1)",
              cases, [x > 0.9 for x in cases]),
        Claim("DPO: least gain of a batch's margin in a step", "never shrinks (section 3)", margins, [x > 0 for x in margins]),
    ]  # fmt: skip
    for name in UP:
        values = [one[name].changes[-1][0] for one in losses]
        found.append(Claim(f"{name}: change of the chosen's", "rises (figure 2)", values, [x > 0 for x in values]))
    for name in DOWN:
        values = [max(one[name].changes[-1]) for one in losses]
        found.append(Claim(f"{name}: the larger of both changes", "both fall (figure 2)", values, [x < 0 for x in values]))
    values = [min(x, -y) for x, y in (one["SPPO"].changes[-1] for one in losses)]
    return [
        *found,
        Claim(
            "SPPO: the lesser of the chosen's rise and of the rejected's fall",
            "rises, falls (figure 2)",
            values,
            [x > 0 for x in values],
        ),
    ]


def rule_claims(rules: Sequence[dict[str, Course]]) -> list[Claim]:
    """Section 5.1, and the family between its ends; what each step did to its own batch, and the sum over steps."""
    family = ["interval t=0", "interval t=0.25", "NPO (t=0.5)", "interval t=0.75", "OGD (t=1)"]
    sums = [{name: np.sum(course.batches, 0) for name, course in one.items()} for one in rules]
    npo = [statistics.fmean(a > 0 > b for a, b in one["NPO (t=0.5)"].batches) for one in rules]
    rises = [min(np.diff([one[name][0] for name in family])) for one in sums]
    stays = [abs(one["OGD (t=1)"][1] / one["OGD (t=1)"][0]) for one in sums]
    leaves = [abs(one["interval t=0"][0] / one["interval t=0"][1]) for one in sums]
    gain = [one["OGD (t=1)"].changes[-1][0] - one["DPO"].changes[-1][0] for one in rules]
    less = [one["OGD (t=1)"].forgotten - one["DPO"].forgotten for one in rules]
    return [
        Claim("NPO: share of steps in which the batch's chosen rise and its rejected fall", "every one, to first order "
              "(section 5.1)", npo, [x >= 0.9 for x in npo]),
        Claim("the batches' chosen rise more with t: least increase from place to place", "not in the paper",
              rises, [bool(x > 0) for x in rises]),
        Claim("OGD: change of the batches' rejected over that of their chosen", "0 to first order (OGD, theorem 5.4)",
              stays, [x < 0.1 for x in stays]),
        Claim("t=0: change of the batches' chosen over that of their rejected", "0 to first order", leaves,
              [x < 0.1 for x in leaves]),
        Claim("OGD raises held-out chosen more than DPO: difference", "not in the paper", gain, [x > 0 for x in gain]),
        Claim("OGD forgets no more than DPO: difference of TAX, percent", "not in the paper", less, [x >= 0 for x in less]),
    ]  # fmt: skip


def middle(values: Sequence[float]) -> str:
    """The median over seeds."""
    return number(statistics.median(values), 3, sign=True)


def style_table(styles: Sequence[dict[str, Course]], angles: Sequence[dict[str, list[float]]]) -> Table:
    """The first part."""
    rows = []
    for style in STYLES:
        ends = [one[style].changes[-1] for one in styles]
        row = [middle([x[0] for x in ends]), middle([x[1] for x in ends])]
        rows.append([style, *row, *(middle([one[style][k] for one in angles]) for k in (0, -1))])
    note = "Changes of held-out log-probabilities, nats an answer, and cosines of the two gradients of single pairs; medians."
    return Table("DPO by style of the answers", ["style", "chosen", "rejected", "cosine at first", "at last"], rows, note)


def course_table(title: str, found: Sequence[dict[str, Course]], told: bool = False) -> Table:
    """The second or the third part."""
    rows = []
    for name in found[0]:
        ends = [one[name].changes[-1] for one in found]
        label = name + (" (a token)" if found[0][name].per_token else "")
        row = [label, *(middle([x[k] for x in ends]) for k in (0, 1))]
        row.append(number(statistics.median(one[name].forgotten for one in found), 1))
        if told:
            row.append(number(100 * statistics.fmean(x for one in found for x in one[name].told), 0, unit="%"))
            cases = [pair for one in found for pair in one[name].cases]
            row += [" ".join(f"{statistics.mode(pair[k] for pair in cases):.0f}" for k in (0, 1))]
        rows.append(row)
    note = "Changes of held-out log-probabilities, nats; TAX on what was pretrained besides, percent; medians over seeds."
    note += (
        " Told rightly: steps whose two directions the condition predicted. Case: the most frequent, predicted and observed."
        * told
    )
    return Table(title, ["", "chosen", "rejected", "TAX", *(["told rightly", "case"] if told else [])], rows, note)


def draw_styles(styles: Sequence[dict[str, Course]]) -> Figure:
    """Chosen and rejected by step, mean over seeds, one panel a style."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    for ax, style in zip(figure.subplots(1, 4, sharey=True), STYLES):
        mean = np.mean([one[style].changes for one in styles], 0)
        for k, (name, color) in enumerate((("chosen", "#0072B2"), ("rejected", "#D55E00"))):
            ax.plot(MEASURED * np.arange(len(mean)), mean[:, k], color=color, label=name)
        ax.axhline(0, color="#777777", lw=0.8)
        ax.set(title=style, xlabel="step")
    figure.axes[0].set_ylabel("change (nats)")
    figure.axes[0].legend(frameon=False)
    return figure


def draw_tokens(maps: Sequence[dict[str, np.ndarray]]) -> Figure:
    """The heat map of token gradients, one panel a style, mean over pairs and seeds."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    for ax, (style, text) in zip(figure.subplots(1, 4), STYLES.items()):
        image = ax.imshow(np.mean([one[style] for one in maps], 0), cmap="coolwarm", vmin=-1, vmax=1)
        words = text.replace("{L}", "LABEL").replace("{l}", "label").split()
        ax.set(title=style, yticks=range(len(words)), yticklabels=words, xticks=range(len(words)))
        ax.set_xticklabels(words, rotation=90)
    figure.colorbar(image, ax=figure.axes, label="cosine")
    return figure


def draw_bars(found: Sequence[dict[str, Course]]) -> Figure:
    """Changes of chosen and rejected, median over seeds."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    ax, names = figure.subplots(), list(found[0])
    for k, (side, color) in enumerate((("chosen", "#0072B2"), ("rejected", "#D55E00"))):
        values = [statistics.median(one[name].changes[-1][k] for one in found) for name in names]
        ax.bar(np.arange(len(names)) + (k - 0.5) * 0.4, values, 0.4, color=color, label=side)
    ax.axhline(0, color="#777777", lw=0.8)
    ax.set(ylabel="change (nats)", xticks=range(len(names)))
    ax.set_xticklabels(names, rotation=45, ha="right")
    ax.legend(frameon=False)
    return figure
