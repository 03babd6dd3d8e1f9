"""A small model that reads statements as text and is then tuned to answer Yes or No: what DPO, OGD and flipped labels do.

The paper's full fine-tuning of Llama-2-7B ("learning dynamics of alignment", figures 6 to 9) at the size of a laptop.
"""

from __future__ import annotations

import copy
import random
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ogdopt.dynamics import separation
from ogdopt.optimizer import ProjectedGradient
from ogdopt_harness.config.schema import ModelConfig
from ogdopt_harness.data.behaviours import NO, YES, Behaviour
from ogdopt_harness.modeling.build import build_model
from ogdopt_harness.modeling.embeddings import embed, last_hidden
from ogdopt_harness.modeling.tokenizer import train_tokenizer

ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
BETA, RATE, STEPS, BATCH = 0.1, 3e-4, 40, 32
USED, HELD_OUT = 250, 50  # questions of either class, and those of them that are not trained on
TEXT_STEPS, TEXT_RATE = 60, 3e-3
EVERY = 10  # steps between two measurements on held-out questions


@dataclass(frozen=True)
class Task:
    """A behaviour as token ids: questions in a fixed mixed order, and 1 where the preferred answer is Yes, -1 for No."""

    name: str
    questions: list[Tensor]
    sign: Tensor  # (n,)

    def embeddings(self, model: Any) -> tuple[Tensor, Tensor]:
        """Those of either class."""
        found = embed(model, self.questions)
        return found[self.sign > 0], found[self.sign < 0]


def words(text: str) -> str:
    """The text as words between spaces, in lower case."""
    return " ".join(re.findall(r"\w+|[^\w\s]|\n", text.lower()))


class Lab:
    """One seed's base model, trained on the statements as text, and its tasks."""

    def __init__(self, behaviours: Sequence[Behaviour], seed: int, folder: Path) -> None:
        config = ModelConfig(None, ARCHITECTURE, None, tokenizer_type="word", vocab_size=2048)
        texts = [words(q) for b in behaviours for q in (*b.positive[:USED], *b.negative[:USED])]
        self.tokenizer = train_tokenizer([*texts, words(YES + NO)], config, folder / "tokenizer")
        self.answers = torch.tensor([self.tokenizer(words(x), add_special_tokens=False).input_ids[0] for x in (YES, NO)])
        self.model, self.seed = build_model(config, self.tokenizer, seed), seed
        order = random.Random(seed)
        splits = [Behaviour(b.name, b.positive[:USED], b.negative[:USED]).split(HELD_OUT) for b in behaviours]
        self.train = [self._task(b, order) for b, _ in splits]
        self.held_out = [self._task(b, order) for _, b in splits]
        self._read(order)

    def _task(self, b: Behaviour, order: random.Random) -> Task:
        rows = [(words(q + "\n"), sign) for side, sign in ((b.positive, 1.0), (b.negative, -1.0)) for q in side]
        order.shuffle(rows)
        ids = self.tokenizer([text for text, _ in rows], add_special_tokens=False).input_ids
        return Task(b.name, [torch.tensor(x) for x in ids], torch.tensor([sign for _, sign in rows]))

    def _read(self, order: random.Random) -> None:
        """Next-word prediction on the questions that train."""
        questions = [q for task in self.train for q in task.questions]
        optimizer = torch.optim.AdamW(self.model.parameters(), TEXT_RATE)
        for _ in range(TEXT_STEPS):
            batch = torch.nn.utils.rnn.pad_sequence(order.sample(questions, BATCH), batch_first=True, padding_value=-100)
            logits = self.model(input_ids=batch.clamp(min=0), attention_mask=(batch >= 0).long()).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def margins(self, model: Any, questions: Sequence[Tensor]) -> Tensor:
        """log pi(Yes) - log pi(No), (n,), without gradients."""
        rows = model.get_output_embeddings().weight[self.answers].detach()
        return embed(model, questions) @ (rows[0] - rows[1])

    def tune(self, start: Any, which: int, flipped: bool = False, ogd: bool = False) -> Tuned:
        """Tune a copy of `start` on a task with its labels as they are or flipped; the reference is `start` itself.

        The loss is DPO's before each step, whatever is descended.
        """
        task, held_out, model = self.train[which], self.held_out[which], copy.deepcopy(start)
        before, sign = self.margins(start, task.questions), -task.sign if flipped else task.sign
        optimizer: Any = torch.optim.AdamW(model.parameters(), RATE)
        if ogd:
            optimizer = ProjectedGradient(optimizer, max_norm=10.0)
        order, losses, differences = random.Random(self.seed), [], []
        for step in range(STEPS + 1):
            if step % EVERY == 0:
                differences.append((self.margins(model, held_out.questions) * held_out.sign).tolist())
            if step == STEPS:
                break
            batch = Batch(task, order.sample(range(len(task.questions)), BATCH), sign, before, self.answers)
            if ogd:
                with torch.no_grad():
                    losses.append(batch.dpo(model).item())
                optimizer.step(lambda b=batch: b.likelihood(model, True), lambda b=batch: b.likelihood(model, False))
            else:
                optimizer.zero_grad()
                loss = batch.dpo(model)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return Tuned(model, np.array(losses), np.array(differences))


class Batch:
    """Questions of one step, their preferred answers, and the reference's margins."""

    def __init__(self, task: Task, rows: list[int], sign: Tensor, before: Tensor, answers: Tensor) -> None:
        self.questions, self.sign, self.before = [task.questions[k] for k in rows], sign[rows], before[rows]
        self.answers = answers

    def _logits(self, model: Any) -> Tensor:
        return model.get_output_embeddings()(last_hidden(model, self.questions))

    def dpo(self, model: Any) -> Tensor:
        """The mean DPO loss; the answers have one token each, so the normalizer cancels."""
        yes, no = self._logits(model)[:, self.answers].T
        return -logsigmoid(BETA * self.sign * (yes - no - self.before)).mean()

    def likelihood(self, model: Any, preferred: bool) -> Tensor:
        """The mean negative log-likelihood of the preferred answers, or of the others."""
        wanted = self.answers[((self.sign > 0) != preferred).long()]
        return torch.nn.functional.cross_entropy(self._logits(model), wanted)


class Tuned(NamedTuple):
    """A tuned model, its DPO loss before every step, and every tenth step the margins of held-out questions."""

    model: Any
    losses: np.ndarray
    """(steps,)"""
    margins: np.ndarray
    """log pi(the behaviour's own answer) - log pi(the other one), whatever labels were trained on, (measurements, n), nats."""

    @property
    def mean_loss(self) -> float:
        """The area under the loss curve, a step."""
        return float(self.losses.mean())


def fine_tuning(behaviours: Sequence[Behaviour], seed: int) -> dict[str, Any]:
    """Each behaviour learned by DPO from the base model; the ends of the scale flipped, from base, DPO's and OGD's model."""
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(behaviours, seed, Path(folder))
    before = [task.embeddings(lab.model) for task in lab.train]
    tuned_ = [lab.tune(lab.model, k) for k in range(len(behaviours))]
    after = [task.embeddings(t.model) for task, t in zip(lab.train, tuned_)]
    apart = [[separation(*sides) for sides in found] for found in (before, after)]
    order = np.argsort([x["dynamics/distinguishability"] for x in apart[0]])
    flips = {}
    for k in (int(order[0]), int(order[-1])):
        ogd = lab.tune(lab.model, k, ogd=True)
        starts = {"base": lab.model, "DPO": tuned_[k].model, "OGD": ogd.model}
        flips[behaviours[k].name] = {
            "aligned": {"DPO": _learned(tuned_[k]), "OGD": _learned(ogd)},
            "flipped": {name: _flipped(lab.tune(model, k, flipped=True)) for name, model in starts.items()},
        }
    return {
        "names": [b.name for b in behaviours],
        "before": apart[0],
        "after": apart[1],
        "losses": [t.losses.tolist() for t in tuned_],
        "accuracy": [float((t.margins[-1] > 0).mean()) for t in tuned_],
        "flips": flips,
        "pictured": {k: (before[k], after[k]) for k in (int(order[0]), int(order[-1]))},
    }


def _learned(t: Tuned) -> dict[str, float]:
    return {"accuracy": float((t.margins[-1] > 0).mean()), "margin": float(t.margins[-1].mean())}


def _flipped(t: Tuned) -> dict[str, Any]:
    return {"losses": t.losses.tolist(), "mean_loss": t.mean_loss, "margins": t.margins.mean(1).tolist(),
            "spread": t.margins.std(1).tolist()}  # fmt: skip
