"""The sentiment experiment's data and small model: tweets or generated statements, four styles of answers, one pretraining.

The paper tunes GPT-2, which knows sentiments and English before. A model of this size has to learn both first. It is pretrained
to say what is felt in many phrasings, the styles' among them, to name the first word, and to find exclamation marks. A short
supervised stage then turns it to one style, long before it is certain of it, as the paper's checkpoint is.
"""

from __future__ import annotations

import copy
import gzip
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from ogdopt.losses import Completion
from ogdopt_harness.common.files import write_text
from ogdopt_harness.data.examples import Example, collate
from ogdopt_harness.modeling.score import completion_logps

FILE = "sentiment/tweet_sentiment_train.jsonl.gz"
STYLES = {
    "single token": "{L}.",
    "short suffix": "{L} sentiment.",
    "long suffix": "{L} sentiment based on my judgement.",
    "prefix and suffix": "It has a {l} sentiment based on my judgement.",
}
"""The four response styles (section 4.2), with one spelling of judgement, so that they differ in the label alone."""
OTHER = {"positive": "negative", "negative": "positive"}
PHRASES = [["sentiment", "mood"], ["based", "built"], ["on"], ["my", "your"], ["judgement.", "view."]]
SPECIALS = ["<pad>", "<unk>", "<feel>", "<first>", "<loud>", "=yes", "=no"]
WORDS, VOCABULARY, WIDTH = 10, 2000, 48
PRETRAINING = range(5000)
"""Rows of the pretraining; the next 1,000 are for supervised tuning, then 1,500 for preferences, and the last are held out."""
TUNING, PREFERENCES, HELD_OUT = range(5000, 6000), range(6000, 7500), range(7500, 7756)


def load(data_dir: str | None) -> list[tuple[str, str]]:
    """(text, positive or negative), 7,756 or more: tweets of a folder that has FILE, or generated ones.

    Neutral tweets are left out. Raises ValueError where the folder has no such file, or too few rows.
    """
    if data_dir is None:
        return generated(HELD_OUT.stop)
    file = Path(data_dir) / FILE
    if not file.is_file():
        raise ValueError(f"data_dir is {data_dir!r}, and there is no {file}; expected rows {{text, label_text}} there, or null")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    found = [(row["text"], row["label_text"]) for row in rows if row["label_text"] in OTHER]
    if len(found) < HELD_OUT.stop:
        raise ValueError(f"{file} has {len(found)} positive or negative rows; expected {HELD_OUT.stop} or more")
    return found


def write_pairs(data_dir: str | None = None, style: str = "long suffix", output_dir: str = "runs/sentiment") -> Path:
    """Rows for training in one style: a tenth of all in sft.jsonl, a tenth in pairs_test.jsonl, the rest in pairs_train.jsonl.

    Args:
        data_dir: Folder with sentiment/tweet_sentiment_train.jsonl.gz, rows {text, label_text}; null: generated statements.
        style: single token, short suffix, long suffix, or prefix and suffix.
        output_dir: Folder to write into.
    """
    if style not in STYLES:
        raise ValueError(f"style is {style!r}; expected one of {', '.join(map(repr, STYLES))}")
    rows, folder = load(data_dir), Path(output_dir)
    random.Random(0).shuffle(rows)
    answers = [[STYLES[style].format(L=x.capitalize(), l=x) for x in (label, OTHER[label])] for _, label in rows]
    pairs = [{"prompt": text, "chosen": a, "rejected": b} for (text, _), (a, b) in zip(rows, answers)]
    tenth = len(pairs) // 10
    sft = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs[:tenth]]
    parts = {"sft": sft, "pairs_train": pairs[tenth:-tenth], "pairs_test": pairs[-tenth:]}
    for name, part in parts.items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))
        print(f"{folder / name}.jsonl: {len(part):,} rows")
    return folder


def generated(n: int) -> list[tuple[str, str]]:
    """Statements whose sentiment is in one of their words, after "not" the opposite one's, some of them exclaimed."""
    rng = random.Random(0)
    good, bad = (
        "love great happy enjoyed sweet fun lovely thanks".split(),
        "hate awful sad lost bitter boring ugly sorry".split(),
    )
    things = "movie song lunch weather game train book coffee garden phone teacher party sea job concert morning".split()
    rows = []
    for _ in range(n):
        word, label = rng.choice([(w, "positive") for w in good] + [(w, "negative") for w in bad])
        denied = rng.random() < 0.2
        who, when = rng.choice(["so", "well", "today", "oh", "yes"]), rng.choice(["again", "here", "now", "tonight"])
        text = f"{who} the {rng.choice(things)} {'not ' if denied else ''}{word} {when}{'!' if rng.random() < 0.4 else ''}"
        rows.append((text, OTHER[label] if denied else label))
    return rows


def split(text: str) -> list[str]:
    """The first ten words, lower case, exclamation marks by themselves."""
    for mark in '.,?*"':
        text = text.replace(mark, " ")
    return text.lower().replace("!", " ! ").split()[:WORDS]


class Sentiment:
    """Rows as token ids, and the questions that are asked about them; answers end without an end token."""

    def __init__(self, rows: Sequence[tuple[str, str]]) -> None:
        rows = list(rows)
        random.Random(0).shuffle(rows)
        texts = [split(text) for text, _ in rows]
        self.labels = [label for _, label in rows]
        common = Counter(word for words in texts[: PRETRAINING.stop] for word in words).most_common(VOCABULARY)
        answers = [word for style in STYLES.values() for L in OTHER for word in style.format(L=L.capitalize(), l=L).split()]
        answers += [word for choice in PHRASES for word in choice] + ["mood.", "shows", "some"]
        words = [*SPECIALS, *(word for word, _ in common), *(f"={word}" for word in answers)]
        self.ids = {word: k for k, word in enumerate(dict.fromkeys(words))}
        self.words = list(self.ids)
        self.texts = [[self.ids.get(word, 1) for word in words] or [1] for words in texts]

    def answer(self, row: int, style: str, flipped: bool = False) -> Example:
        """A row with its label, or the other one, in a style."""
        label = OTHER[self.labels[row]] if flipped else self.labels[row]
        return self._asked(row, "<feel>", STYLES[style].format(L=label.capitalize(), l=label).split())

    def phrased(self, row: int, rng: random.Random) -> Example:
        """A row with its label, in a phrasing drawn at random."""
        label, tail = self.labels[row], [rng.choice(words) for words in PHRASES]
        L = label.capitalize()
        forms = [[f"{L}."], [L, rng.choice(["sentiment.", "mood."])], [L, *tail]]
        forms.append(["It", rng.choice(["has", "shows"]), rng.choice(["a", "some"]), label, *tail])
        return self._asked(row, "<feel>", rng.choice(forms))

    def first_word(self, row: int) -> Example:
        """What is the first word?"""
        return Example([*self.texts[row], self.ids["<first>"]], self.texts[row][:1])

    def loud(self, row: int) -> Example:
        """Is there an exclamation mark?"""
        found = self.ids.get("!", -1) in self.texts[row]
        return self._asked(row, "<loud>", ["yes" if found else "no"])

    def _asked(self, row: int, question: str, words: Sequence[str]) -> Example:
        return Example([*self.texts[row], self.ids[question]], [self.ids[f"={word}"] for word in words])


def score(model: PreTrainedModel, examples: Sequence[Example]) -> Completion:
    """Log-probabilities of answers."""
    return completion_logps(model, *collate(examples, 0))


def pretrained(data: Sentiment, steps: int = 300, batch: int = 64) -> PreTrainedModel:
    """The model that all seeds start from."""
    torch.manual_seed(0)
    size: dict[str, Any] = dict(n_embd=WIDTH, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)
    size |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(data.words), **size))
    rng = random.Random(0)

    def rows() -> list[Example]:
        drawn = [rng.choice(PRETRAINING) for _ in range(batch)]
        asked: list[Callable[[int], Example]] = [*[lambda row: data.phrased(row, rng)] * 4, data.first_word, data.loud]
        return [asked[k % 6](row) for k, row in enumerate(drawn)]

    return descend(model, rows, steps, 3e-3, decay=True)


def tuned(model: PreTrainedModel, data: Sentiment, style: str, seed: int, steps: int = 6) -> PreTrainedModel:
    """A copy that has been turned to one style, but not for long."""
    rng = random.Random(seed)
    return descend(copy.deepcopy(model), lambda: [data.answer(rng.choice(TUNING), style) for _ in range(32)], steps, 1e-3)


def descend(
    model: PreTrainedModel, rows: Callable[[], list[Example]], steps: int, rate: float, decay: bool = False
) -> PreTrainedModel:
    """Supervised training with AdamW; `decay` warms the rate up and takes it down to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (min(1.0, (step + 1) / 20) * (1 - step / steps) if decay else 1.0)
        optimizer.zero_grad()
        (-score(model, rows()).logp.mean()).backward()
        optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: PreTrainedModel, examples: Sequence[Example]) -> float:
    """Share of answers of one token that are the likeliest of all tokens."""
    batch = collate(examples, 0)
    guessed = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].argmax(-1)
    return (guessed == batch.input_ids[:, 1:])[batch.loss_mask[:, 1:]].double().mean().item()
