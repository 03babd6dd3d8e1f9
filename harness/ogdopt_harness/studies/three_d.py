"""3D-properties of DPO on the paper's toy: the rejected drop, the chosen are unlearned, probability leaves for other answers.

Four prompts, ten answers, a three-layer perceptron on one-hot inputs. Answers 1-4 are the chosen ones of the four prompts, 5-8
are rejected, 9-10 never occur. First the network is fitted to given probabilities: 0.12 for on-policy answers, 0.02 for
off-policy ones. Then it is tuned on one pair a prompt, whose rejected answer is drawn once.

The paper gives neither the network's size nor optimizer, rate and beta. No configuration is known that shows its whole figure 2
(rejected to 0, chosen rising and then clearly falling, unseen rising) in every seed; the two here show a part each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import log_softmax

from ogdopt.diagnostics import weights
from ogdopt.gram import Gram
from ogdopt.losses import LOSSES, Completion, Pairs
from ogdopt.projection import Rule, normalized, orthogonal
from ogdopt.three_d import ThreeD
from ogdopt_harness.analysis.claims import Claim, Findings, Picture
from ogdopt_harness.common.tables import Table, number, tiny

PROMPTS, ANSWERS = 4, 10
SCENARIOS = {"S1 on/on": (0.12, 0.12), "S2 off/on": (0.02, 0.12), "S3 on/off": (0.12, 0.02), "S4 off/off": (0.02, 0.02)}
"""Probabilities of each chosen and each rejected answer at the start; 9 and 10 share the rest."""
EVERY = 20
"""Steps between two records."""


@dataclass(frozen=True)
class Configuration:
    """The network and both of its trainings, full batches with Adam."""

    width: int
    activation: Callable[[Tensor], Tensor]
    tuned: int
    """Parameters (weights and biases in order) that the second training moves: 6, or the hidden layers' 4."""
    rate: float
    steps: int


A = Configuration(64, torch.relu, 6, 3e-4, 1200)
B = Configuration(32, torch.tanh, 4, 1e-2, 2500)
FIT_RATE, FIT_STEPS = 3e-3, 500


@dataclass(frozen=True)
class Remedy:
    """A way of tuning: a loss of the table, or a rule for the two likelihoods' gradients."""

    label: str
    loss: Callable[[Pairs], Tensor] | None = None
    rule: Rule | None = None


REMEDIES = {
    "dpo": Remedy("DPO", partial(LOSSES["dpo"], beta=0.1)),
    "flex_0.02": Remedy("Flex-DPO β⁻=0.02", partial(LOSSES["flex_dpo"], beta_chosen=0.1, beta_rejected=0.02)),
    "flex_0.01": Remedy("Flex-DPO β⁻=0.01", partial(LOSSES["flex_dpo"], beta_chosen=0.1, beta_rejected=0.01)),
    "sft_dpo": Remedy("SFT-DPO γ=0.1", partial(LOSSES["sft_dpo"], beta=0.1, gamma=0.1)),
    "ipo": Remedy("IPO η=0.1", partial(LOSSES["ipo"], beta=0.1)),
    "slic": Remedy("SLiC δ=5 η=0.1", partial(LOSSES["slic_hf"], delta=5.0, nll_weight=0.1)),
    "ogd": Remedy("OGD", rule=orthogonal),
    "npo": Remedy("NPO", rule=normalized),
}
SWEPT = (0.2, 0.1, 0.08, 0.05, 0.02, 0.01, 0.005)
"""Values of beta- at beta+ = 0.1; 0.1 is DPO."""

Parameters = list[Tensor]  # weights (N, in, out) and biases (N, 1, out) of N networks, layer after layer


class Course(NamedTuple):
    """What was recorded of N networks, every twentieth step: (T, N), means over the prompts."""

    steps: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    unseen: np.ndarray
    """Probability of answers 9 and 10."""
    outside: np.ndarray
    """Probability of all answers but the prompt's own chosen one and the rejected ones, 5-8."""
    to_chosen: np.ndarray
    """|dL/d pi+|; for a rule, that of the mixture of both likelihoods, by its first coefficient's share."""
    to_rejected: np.ndarray


def fresh(seed: int, width: int) -> Parameters:
    """One network with torch's own initialization, uniform within 1/sqrt(inputs)."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for inputs, outputs in ((PROMPTS, width), (width, width), (width, ANSWERS)):
        for shape in ((1, inputs, outputs), (1, 1, outputs)):
            found.append((2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) / inputs**0.5)
    return found


def log_probabilities(parameters: Parameters, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """log pi(answer | prompt) of N networks, (N, 4, 10); the prompts are one-hot, so the first layer maps them to its rows."""
    W1, b1, W2, b2, W3, b3 = parameters
    hidden = activation(activation(W1 + b1) @ W2 + b2)
    return log_softmax(hidden @ W3 + b3, -1)


def start(seeds: Sequence[int], configuration: Configuration, scenarios: Sequence[str]) -> Parameters:
    """Networks fitted to the scenarios' probabilities, all seeds of the first, then of the next."""
    nets = [fresh(seed, configuration.width) for _ in scenarios for seed in seeds]
    parameters = [torch.cat(same).requires_grad_() for same in zip(*nets)]
    rows = []
    for name in scenarios:
        on, off = SCENARIOS[name]
        rows += [torch.tensor([on] * 4 + [off] * 4 + [(1 - 4 * on - 4 * off) / 2] * 2, dtype=torch.float64)] * len(seeds)
    target = torch.stack(rows)[:, None]
    optimizer = torch.optim.Adam(parameters, FIT_RATE, fused=True)
    for _ in range(FIT_STEPS):
        optimizer.zero_grad()
        loss = -(target * log_probabilities(parameters, configuration.activation)).sum(-1).mean(-1).sum()
        loss.backward()
        optimizer.step()
    return [p.detach() for p in parameters]


def drawn(seeds: Sequence[int], copies: int) -> Tensor:
    """The rejected answer of each network and prompt, (N, 4): one of 5-8, the same in all scenarios."""
    once = [torch.randint(4, 8, (PROMPTS,), generator=torch.Generator().manual_seed(1000 + seed)) for seed in seeds]
    return torch.stack(once * copies)


def tune(parameters: Parameters, rejected: Tensor, remedy: Remedy, configuration: Configuration) -> Course:
    """The second training of N networks at once; each has a loss, a gradient and an Adam state of its own."""
    parameters = [p.clone() for p in parameters]
    moved = [p.requires_grad_() for p in parameters[: configuration.tuned]]
    optimizer = torch.optim.Adam(moved, configuration.rate, fused=True)
    own = torch.arange(PROMPTS).expand_as(rejected)
    with torch.no_grad():
        table = log_probabilities(parameters, configuration.activation)
        reference = tuple(_of(table, answer).flatten() for answer in (own, rejected))
    records = []
    for step in range(configuration.steps + 1):
        table = log_probabilities(parameters, configuration.activation)
        a, b = _of(table, own), _of(table, rejected)
        pairs = Pairs(_single(a), _single(b), *reference)
        if step % EVERY == 0:
            records.append((step, *_record(table.detach(), pairs, remedy, moved, a, b)))
        if step == configuration.steps:
            break
        optimizer.zero_grad()
        _set_gradients(pairs, remedy, moved, a, b)
        optimizer.step()
    steps, *columns = zip(*records)
    return Course(np.array(steps), *(torch.stack(column).numpy() for column in columns))


def _of(table: Tensor, answer: Tensor) -> Tensor:
    return table.gather(2, answer[..., None])[..., 0]  # (N, 4)


def _single(logp: Tensor) -> Completion:
    """Answers of one token each, all networks' prompts in a row."""
    return Completion(logp.reshape(-1, 1), torch.ones(logp.numel(), 1, dtype=torch.bool))


def _set_gradients(pairs: Pairs, remedy: Remedy, moved: Parameters, a: Tensor, b: Tensor) -> None:
    if remedy.loss is not None:
        (remedy.loss(pairs).sum() / PROMPTS).backward()
        return
    (g_w, g_l), x, y = _mixture(remedy, moved, a, b)
    for p, w, l in zip(moved, g_w, g_l):
        p.grad = x[:, None, None] * w + y[:, None, None] * l


def _mixture(remedy: Remedy, moved: Parameters, a: Tensor, b: Tensor) -> tuple[list[tuple[Tensor, ...]], Tensor, Tensor]:
    """Both likelihoods' gradients, and each network's coefficients of them."""
    assert remedy.rule is not None
    sides = [torch.autograd.grad(-logp.sum() / PROMPTS, moved, retain_graph=True) for logp in (a, b)]

    def inner(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
        return sum(((u * v).sum((1, 2)) for u, v in zip(one, other)), torch.zeros(len(a), dtype=a.dtype))

    g_w, g_l = sides
    x, y = remedy.rule(Gram(inner(g_w, g_w), inner(g_w, g_l), inner(g_l, g_l)))
    return sides, x, y


def _record(table: Tensor, pairs: Pairs, remedy: Remedy, moved: Parameters, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    pi_w, pi_l = a.detach().exp(), b.detach().exp()
    if remedy.loss is not None:
        d_w, d_l = (d.reshape(pi_w.shape) for d in weights(remedy.loss, pairs))
    else:
        _, x, y = _mixture(remedy, moved, a, b)
        d_w, d_l = x[:, None], -y[:, None]
    probabilities = table.exp()
    unseen = probabilities[..., 8:].sum(-1)
    elsewhere = 1 - pi_w - probabilities[..., 4:8].sum(-1)
    found = (pi_w, pi_l, unseen, elsewhere, d_w.abs() / pi_w, d_l.abs() / pi_l)
    return tuple(x.mean(1) for x in found)


# ---- what was found --------------------------------------------------------------------------------------------------------

Courses = Mapping[str, Course]


def at(course: Course, key: str, scenario: int, seeds: int) -> np.ndarray:
    """One recorded quantity of one scenario, (T, seeds)."""
    return getattr(course, key)[:, scenario * seeds : (scenario + 1) * seeds]


def ends(course: Course, key: str, seeds: int) -> np.ndarray:
    """The last values, (scenarios, seeds)."""
    return getattr(course, key)[-1].reshape(-1, seeds)


def median(values: np.ndarray, digits: int = 2) -> str:
    """Median over the seeds with the range."""
    return f"{number(float(np.median(values)), digits)} [{number(values.min(), digits)}–{number(values.max(), digits)}]"


def course_table(course: Course, seeds: int) -> Table:
    """How DPO moves the chosen, and the probability outside, in each scenario."""
    rows = []
    for k, name in enumerate(SCENARIOS):
        chosen, outside = (at(course, key, k, seeds) for key in ("chosen", "outside"))
        peak = chosen.argmax(0)
        each = np.arange(seeds)
        places = [[x[0], x[peak, each], x[-1]] for x in (chosen, outside)]
        arrows = [" → ".join(number(float(np.median(v)), 2) for v in place) for place in places]
        last = [
            tiny(float(np.median(at(course, key, k, seeds)[-1]))) for key in ("unseen", "rejected", "to_chosen", "to_rejected")
        ]
        rows.append([name, arrows[0], str(int(np.median(course.steps[peak]))), arrows[1], *last])
    note = (
        "Medians over the seeds: the chosen answer's probability at the start, at its peak and at the end; U, the probability "
        "outside of it and of the rejected answers 5-8, at the same steps; then at the end. |∂/∂π| is the loss's "
        "gradient with respect to the two probabilities."
    )
    columns = ["scenario", "π⁺ start → peak → end", "peak at", "U at the same", "π(9)+π(10)", "π⁻", "|∂/∂π⁺|", "|∂/∂π⁻|"]
    return Table("DPO, configuration A", columns, rows, note)


def remedy_table(courses: Courses, seeds: int) -> Table:
    """Where every method ends."""
    rows = []
    for name, remedy in REMEDIES.items():
        course = courses[name]
        falls = course.chosen.max(0) - course.chosen[-1]
        cells = [median(values) for values in ends(course, "chosen", seeds)]
        rows.append([remedy.label, *cells, tiny(float(np.median(course.rejected[-1]))), number(float(np.median(falls)), 3)])
    note = (
        "The chosen answer's probability after the last step, median [lowest–highest] over the seeds; then medians over all "
        "scenarios and seeds: the rejected one's, and how far the chosen fell from its peak."
    )
    return Table(
        "All methods, configuration A: probability of the chosen at the end",
        ["method", *SCENARIOS, "π⁻", "fall from peak"],
        rows,
        note,
    )


def sweep_table(courses: Courses, seeds: int) -> Table:
    """The chosen answer's end by beta-."""
    rows = [[f"β⁻={x:g}", *(median(values) for values in ends(courses[swept(x)], "chosen", seeds))] for x in SWEPT]
    return Table(
        "Flex-DPO at β⁺=0.1: probability of the chosen at the end",
        ["", *SCENARIOS],
        rows,
        "Median [lowest–highest] over seeds.",
    )


def swept(beta_rejected: float) -> str:
    """The name of the course of one beta-."""
    return "dpo" if beta_rejected == 0.1 else f"flex_{beta_rejected:g}"


def claims(courses: Courses, b: Course, seeds: int) -> list[Claim]:
    """What the paper says of its toy, on configurations A and B, one verdict a seed."""
    dpo = courses["dpo"]
    end = {name: ends(course, "chosen", seeds) for name, course in courses.items()}
    gone = {name: ends(course, "rejected", seeds) for name, course in courses.items()}
    fall = {name: (course.chosen.max(0) - course.chosen[-1]).reshape(-1, seeds) for name, course in courses.items()}
    peaks = dpo.chosen.max(0).reshape(-1, seeds)
    growth = np.log10(dpo.to_rejected[-1] / dpo.to_rejected[0]).reshape(-1, seeds)
    shrink = (dpo.to_chosen[-1] / dpo.to_chosen[0]).reshape(-1, seeds)
    first = {key: at(dpo, key, 0, seeds) for key in ("chosen", "outside", "unseen")}
    after = first["outside"][-1] - first["outside"][first["chosen"].argmax(0), np.arange(seeds)]
    strict = first["unseen"][-1] - first["unseen"][0]
    spread = (dpo.outside[-1] - dpo.outside[0]).reshape(-1, seeds)
    highest = peaks[0] - peaks[1:].max(0)
    least = spread[0] - spread[1:].min(0)

    def ordered(*names: str) -> np.ndarray:
        """The least gap between neighbours of the order, over the scenarios, (seeds,)."""
        return np.min([end[y] - end[x] for x, y in itertools.pairwise(names)], axis=(0, 1))

    def claim(text: str, paper: str, values: np.ndarray, holds: np.ndarray) -> Claim:
        return Claim(text, paper, values.tolist(), holds.tolist())

    silent, flex = "–", ["dpo", "flex_0.02", "flex_0.01"]
    slower = np.min([gone[name] / np.maximum(gone["dpo"], 1e-300) for name in flex[1:]], axis=(0, 1))
    by_beta = np.array([end[swept(x)] for x in SWEPT])  # (swept, scenarios, seeds), falling beta-
    b_strict, b_fall = b.unseen[-1] - b.unseen[0], b.chosen.max(0) - b.chosen[-1]
    off = "S1, configuration A: "
    return [
        claim("A, DPO: the rejected end below 1e-6 in all scenarios: largest end", "to 0 (figures 2, 3)", gone["dpo"].max(0),
              np.all(gone["dpo"] < 1e-6, axis=0)),
        claim("A, DPO: the gradient on the rejected explodes in all scenarios: least growth, powers of ten",
              "explodes (figure 2, corollary 2)", growth.min(0), growth.min(0) > 3),
        claim("A, DPO: the gradient on the chosen vanishes in all scenarios: largest end over start", "to 0 (corollary 2)",
              shrink.max(0), shrink.max(0) < 0.1),
        claim(off + "the chosen rise, then fall at all: fall from the peak", "rises, then falls (figure 2)", fall["dpo"][0],
              fall["dpo"][0] > 1e-3),
        claim(off + "the chosen clearly fall, by a third of the peak: fall over peak", "clearly falls (figure 2)",
              fall["dpo"][0] / peaks[0], fall["dpo"][0] > peaks[0] / 3),
        claim(off + "U rises while both fall, from the peak on: rise", "disperses (property 3)", after, after > 0),
        claim(off + "unseen answers 9, 10 rise: change of π(9)+π(10)", "rises (figure 2)", strict, strict > 0),
        claim("A, DPO: S1 has the highest peak: peak minus the highest other", "highest, about 0.6 (figure 3)", highest,
              highest > 0),
        claim("A, DPO: S1 disperses least: rise of U minus the least other", "least (figure 3)", least, least < 0),
        claim("A: SLiC ends above DPO, SFT-DPO above both, in all scenarios: least gap", "better than DPO (section 5)",
              ordered("dpo", "slic", "sft_dpo"), ordered("dpo", "slic", "sft_dpo") > 0),
        claim("A: DPO < Flex 0.02 < Flex 0.01 < SFT-DPO in all scenarios: least gap", "better than DPO (section 5)",
              ordered(*flex, "sft_dpo"), ordered(*flex, "sft_dpo") > 0),
        claim("A: SLiC and SFT-DPO do not fall from their peak: largest fall", "stay (figures 7, 8)",
              np.maximum(fall["slic"], fall["sft_dpo"]).max(0), np.maximum(fall["slic"], fall["sft_dpo"]).max(0) < 0.01),
        claim("A: IPO ends above DPO in all scenarios: least gap", "better than DPO (figures 5, 6)", ordered("dpo", "ipo"),
              ordered("dpo", "ipo") > 0),
        claim("A: Flex-DPO slows the fall of the rejected in all scenarios: least ratio of their ends",
              "slows it (proposition 1)", slower, slower > 1),
        claim("A: the chosen end higher, the smaller β⁻, over 0.1, 0.02, 0.01 in all scenarios: least gap",
              "as proposition 1 has it", ordered(*flex), ordered(*flex) > 0),
        claim("A: over all β⁻ the end rises, then falls as β⁻ grows (S1): highest minus that of the smallest β⁻",
              "best in between, about 0.08 (figure 9)", by_beta[:, 0].max(0) - by_beta[-1, 0],
              by_beta[:, 0].max(0) > by_beta[-1, 0] + 1e-3),
        claim("A: OGD ends above DPO in all scenarios: least gap", silent, ordered("dpo", "ogd"), ordered("dpo", "ogd") > 0),
        claim("A: OGD's chosen do not fall from their peak: largest fall", silent, fall["ogd"].max(0),
              fall["ogd"].max(0) < 0.01),
        claim("A: NPO ends above DPO in all scenarios: least gap", silent, ordered("dpo", "npo"), ordered("dpo", "npo") > 0),
        claim("B, DPO, S1: unseen answers 9, 10 rise: change of π(9)+π(10)", "rises (figure 2)", b_strict, b_strict > 0),
        claim("B, DPO, S1: the rejected end below 1e-6: end", "to 0 (figure 2)", b.rejected[-1], b.rejected[-1] < 1e-6),
        claim("B, DPO, S1: the chosen clearly fall, by a third of the peak: fall over peak", "clearly falls (figure 2)",
              b_fall / b.chosen.max(0), b_fall > b.chosen.max(0) / 3),
    ]  # fmt: skip


COLORS = {"chosen": "#0072B2", "rejected": "#D55E00", "unseen": "#009E73", "outside": "#999999"}
NAMES = {"chosen": "π⁺ chosen", "rejected": "π⁻ rejected", "unseen": "π(9)+π(10)", "outside": "U, all others"}


def draw_course(course: Course, seeds: int, scenarios: Sequence[str]) -> Figure:
    """Probabilities, and below them the gradients with respect to them, one column a scenario; seeds thin, medians thick."""
    figure = Figure(figsize=(3.4 * max(2, len(scenarios)), 6.4), layout="constrained")
    axes = figure.subplots(2, len(scenarios), sharex=True, sharey="row", squeeze=False)
    for k, name in enumerate(scenarios):
        top, bottom = axes[0, k], axes[1, k]
        for key, color in COLORS.items():
            _lines(top, course.steps, at(course, key, k, seeds), color, NAMES[key])
        for key, side in (("to_chosen", "chosen"), ("to_rejected", "rejected")):
            values = np.log10(np.maximum(at(course, key, k, seeds), 1e-12))
            _lines(bottom, course.steps, values, COLORS[side], f"{side}")
        top.set_title(name)
        bottom.set_xlabel("step")
    axes[0, 0].set_ylabel("probability")
    axes[1, 0].set_ylabel("log10 |∂L/∂π|")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=11)
    return figure


def _lines(ax, steps: np.ndarray, values: np.ndarray, color: str, label: str) -> None:
    ax.plot(steps, values, color=color, lw=0.6, alpha=0.4)
    ax.plot(steps, np.median(values, 1), color=color, lw=2, label=label)


def draw_remedies(courses: Courses, seeds: int) -> Figure:
    """The chosen answer's probability under every method, one panel a scenario."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, len(SCENARIOS), sharey=True)
    hues = ["#0072B2", "#56B4E9", "#88CCEE", "#009E73", "#999999", "#E69F00", "#D55E00", "#CC79A7"]
    for k, (ax, name) in enumerate(zip(axes, SCENARIOS)):
        for (method, remedy), color in zip(REMEDIES.items(), hues):
            course = courses[method]
            ax.plot(course.steps, np.median(at(course, "chosen", k, seeds), 1), color=color, lw=2, label=remedy.label)
        ax.set(title=name, xlabel="step")
    axes[0].set_ylabel("π⁺ chosen")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=11)
    return figure


def draw_sweep(courses: Courses, seeds: int) -> Figure:
    """The chosen answer's end by beta-."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    ax = figure.subplots()
    values = np.array([ends(courses[swept(x)], "chosen", seeds) for x in SWEPT])  # (swept, scenarios, seeds)
    for k, name in enumerate(SCENARIOS):
        ax.plot(SWEPT, np.median(values[:, k], 1), marker="o", label=name)
    ax.set(xscale="log", xlabel="β⁻ (β⁺ = 0.1)", ylabel="π⁺ chosen, at the end")
    ax.set_xticks(SWEPT, [f"{x:g}" for x in SWEPT])
    ax.minorticks_off()
    ax.legend(frameon=False)
    return figure


def warned(course: Course, scenario: int, seeds: int) -> list[str]:
    """What the live diagnostics say of one run, the first seed's."""
    watch = ThreeD()
    chosen, rejected, outside = (at(course, key, scenario, seeds)[:, 0] for key in ("chosen", "rejected", "outside"))
    for step, a, b, u in zip(course.steps, chosen, rejected, outside):
        watch.observe(float(step), float(np.log(a)), float(np.log(b)), float(u))
    return list(watch.warnings.values())


def study(seeds: Sequence[int] = (0, 1, 2, 3, 4)) -> Findings:
    """Both configurations; a seed draws a network's weights and the rejected answers.

    Args:
        seeds: One network a seed, scenario and method.
    """
    n, names = len(seeds), list(SCENARIOS)
    fitted, rejected = start(seeds, A, names), drawn(seeds, len(names))
    flex = {swept(x): Remedy("", partial(LOSSES["flex_dpo"], beta_chosen=0.1, beta_rejected=x)) for x in SWEPT if x != 0.1}
    courses = {name: tune(fitted, rejected, remedy, A) for name, remedy in (flex | REMEDIES).items()}
    b = tune(start(seeds, B, names[:1]), drawn(seeds, 1), REMEDIES["dpo"], B)
    notes = [
        "The paper gives neither layer sizes nor optimizer, learning rate or beta of its toy; configurations A (ReLU, width "
        "64, Adam 3e-4, 1200 steps) and B (tanh, width 32, the output layer frozen, Adam 1e-2, 2500 steps) are ours, and were "
        "picked from sweeps as those that show most. Neither shows the whole of figure 2. DPO's gradient on the logit of an "
        "unseen answer is 0, so what moves 9 and 10 is shared weights alone.",
        f"What the diagnostics of ogdopt.three_d say of DPO in S1, seed {seeds[0]}: "
        + "; ".join(warned(courses["dpo"], 0, n))
        + ".",
    ]
    look = "Thin: seeds; thick: median. Look for "
    pictures = [
        Picture("figure2_3_dpo", look + "a rejected answer that goes to 0 with an exploding gradient, and a chosen one that "
                "falls after its peak.", draw_course(courses["dpo"], n, names)),
        Picture("figure5_6_ipo", look + "rejected answers that stop falling.", draw_course(courses["ipo"], n, names)),
        Picture("figure7_8_slic", look + "chosen answers that stay at their peak.", draw_course(courses["slic"], n, names)),
        Picture("ogd", look + "chosen answers that rise to the end while the rejected are left alone.",
                draw_course(courses["ogd"], n, names)),
        Picture("figure2_configuration_b", look + "unseen answers that rise.", draw_course(b, n, names[:1])),
        Picture("remedies", "Medians. Look for curves that do not bend down.", draw_remedies(courses, n)),
        Picture("figure9_sweep", "Look for a maximum between the ends: figure 9 has one, the toy does not.",
                draw_sweep(courses, n)),
    ]  # fmt: skip
    tables = [course_table(courses["dpo"], n), remedy_table(courses, n), sweep_table(courses, n)]
    kept = {
        name: {key: ends(course, key, n).tolist() for key in Course._fields[1:]}
        for name, course in (courses | {"B": b}).items()
    }
    return Findings(seeds, claims(courses, b, n), tables, pictures, notes, {"ends": kept, "scenarios": names})
