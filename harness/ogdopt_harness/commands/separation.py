"""How far apart models put the two classes of behaviours: `ogdopt separation MODEL... --data_dir FOLDER`, the first one before.

For every behaviour of persona statements and every model (folder or hub id): distinguishability, concentration, the cosine of
the decision boundary, and the priority that the behaviour has among all ("learning dynamics of alignment", section 4). Prints a
table, and writes separation.json and a picture of each behaviour's embeddings in all models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from ogdopt.dynamics import means, priority, separation
from ogdopt_harness.common.device import device_name
from ogdopt_harness.common.files import write_json
from ogdopt_harness.common.run_folder import short_name
from ogdopt_harness.common.tables import NONE, Table, number, tiny
from ogdopt_harness.config.commands import SeparationConfig
from ogdopt_harness.data.behaviours import NO, YES, Behaviour, read_behaviours
from ogdopt_harness.evaluation.lm import load
from ogdopt_harness.modeling.adapters import bare
from ogdopt_harness.modeling.embeddings import embed, flat
from ogdopt_harness.reporting.figures import PAPER


def main(config: SeparationConfig, models: Sequence[str]) -> None:
    """Measure all models, print the table and write the files."""
    table = measure(models, config)
    console = Console()
    table.show(console)
    console.print(table.note, "", sep="\n")
    print(f"Written: {Path(config.output_dir) / 'separation.json'}")


def measure(models: Sequence[str], config: SeparationConfig) -> Table:
    """Everything of every model and behaviour. Raises ValueError for behaviours, models and rows that cannot be used."""
    behaviours = chosen(read_behaviours(config.data_dir), config)
    labels = [short_name(Path(model)) for model in models]
    found: dict[str, dict[str, dict[str, float]]] = {}
    places: dict[str, list[tuple[Tensor, Tensor]]] = {b.name: [] for b in behaviours}
    for label, model in zip(labels, models, strict=True):
        if label in found:
            raise ValueError(f"two models are called {label}; give folders whose last parts differ")
        loaded, words = load(model, device_name(config.device), apply_chat_template=False)
        sides = {b.name: embedded(loaded, words, b, config) for b in behaviours}
        levels = priority(torch.stack([means(*pair) for pair in sides.values()])).tolist()
        boundary = decision(loaded, words, behaviours[0].positive[0])
        found[label] = {
            name: separation(*pair, boundary) | {"dynamics/priority": level}
            for (name, pair), level in zip(sides.items(), levels, strict=True)
        }
        for name, pair in sides.items():
            places[name].append(pair)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(PAPER):
        for name, pairs in places.items():
            picture(name, labels, pairs).savefig(folder / f"{name}.svg", metadata={"Date": None})
    write_json(folder / "separation.json", {"models": dict(zip(labels, models, strict=True)), "measures": found})
    return table_of(behaviours, found)


def chosen(known: dict[str, Behaviour], config: SeparationConfig) -> list[Behaviour]:
    """The behaviours asked for, cut to `limit` questions of either class."""
    unknown = [name for name in config.behaviours or () if name not in known]
    if unknown:
        raise ValueError(f"behaviours names {unknown}; {config.data_dir} has {', '.join(known)}")
    found = [
        Behaviour(b.name, b.positive[: config.limit], b.negative[: config.limit])
        for name, b in known.items()
        if name in (config.behaviours or known) and b.positive and b.negative
    ]
    if not found:
        raise ValueError(f"data_dir: no behaviour of {config.data_dir} has questions of both answers")
    return found


def asked(words: Any, question: str) -> list[int]:
    """The question's token ids: in the tokenizer's chat template, or, as in the paper, with a line break after it."""
    if words.chat_template:
        text = words.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
        return words(text, add_special_tokens=False).input_ids
    return words(question + "\n").input_ids


def embedded(model: Any, words: Any, b: Behaviour, config: SeparationConfig) -> tuple[Tensor, Tensor]:
    """Embeddings of the questions of either answer, (n, d) and (m, d)."""
    yes, no = (embed(model, [asked(words, q) for q in side], config.batch_size) for side in (b.positive, b.negative))
    return yes, no


def decision(model: Any, words: Any, question: str) -> Tensor:
    """The unembedding's row of the answer Yes minus that of No, (d,), where the two answers to a question first differ."""
    prompt = asked(words, question)
    pair = [words(answer, add_special_tokens=False).input_ids for answer in (YES, NO)]
    first, second = next((x, y) for x, y in zip(*(prompt + ids + [-1] for ids in pair)) if x != y)
    head: Any = bare(model).get_output_embeddings()
    rows = head.weight.detach().float().cpu()
    return rows[first] - rows[second]


def table_of(behaviours: Sequence[Behaviour], found: dict[str, dict[str, dict[str, float]]]) -> Table:
    """One row a behaviour and model."""
    keys = ("distinguishability", "concentration", "spread", "boundary_cosine", "priority")
    rows = []
    for b in behaviours:
        for label, measures in found.items():
            values = [measures[b.name].get(f"dynamics/{key}") for key in keys]
            small = [NONE if x is None else tiny(x, 3) for x in values[:3]]
            rows.append([f"{b.name}, {label}", *small, number(values[3], 3), number(values[4], 3)])
    note = (
        "Distinguishability: distance of the means of the two classes' last hidden states; concentration: largest variance of "
        "either; spread: concentration over squared distinguishability, small where the classes are well apart. Cosine: of the "
        "unembedding's Yes minus No with the difference of the means. Priority: equation (5), among these behaviours."
    )
    columns = ["behaviour, model", "distinguishability", "concentration", "spread", "boundary cosine", "priority"]
    return Table("How behaviours lie in feature space", columns, rows, note)


def picture(name: str, labels: Sequence[str], pairs: Sequence[tuple[Tensor, Tensor]]) -> Figure:
    """One behaviour's embeddings in two dimensions, in each model."""
    figure = Figure(figsize=(4.6 * len(pairs), 4.4), layout="constrained")
    for ax, label, (positive, negative) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], labels, pairs):
        points, method = flat(torch.cat([positive, negative]))
        for part, color, answer in ((points[: len(positive)], "#009E73", "Yes"), (points[len(positive) :], "#999999", "No")):
            ax.plot(*part.T, "o", ms=3, color=color, alpha=0.6, label=answer)
        ax.set_title(f"{name[:30]}, {label} ({method})", fontsize=9)
        ax.legend(frameon=False)
    return figure
