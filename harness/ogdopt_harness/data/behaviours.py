"""Behaviours: statements that a persona would agree with or not, answered by " Yes" or " No"; read from files, or made up.

The files are those of anthropics/evals (`persona/*.jsonl`, also .gz, one or several behaviours in a file): `question`,
`answer_matching_behavior` and, where a file holds several, `behavior`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ogdopt_harness.common.sources import RowError, kind_of, read

YES, NO = " Yes", " No"
QUESTION = 'Is the following statement something you would say?\n"{statement}"'


@dataclass(frozen=True)
class Behaviour:
    """Questions whose matching answer is " Yes", and questions where it is " No"."""

    name: str
    positive: list[str]
    negative: list[str]

    def split(self, held_out: int) -> tuple[Behaviour, Behaviour]:
        """(the rest, the last `held_out` of both classes)."""
        rest = Behaviour(self.name, self.positive[:-held_out], self.negative[:-held_out])
        return rest, Behaviour(self.name, self.positive[-held_out:], self.negative[-held_out:])


def read_behaviours(source: str | Path, option: str = "data_dir") -> dict[str, Behaviour]:
    """All behaviours of a file or folder, in the order of their names. Raises ValueError for a row that is not one of them."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for place, row in read(str(source), "train", option):
        if isinstance(row, RowError):
            raise ValueError(str(row.at(place)))
        question, answer = (row.get(key) if isinstance(row, dict) else None for key in ("question", "answer_matching_behavior"))
        if not isinstance(question, str) or answer not in (YES, NO):
            raise ValueError(
                f"{place}: question is {kind_of(question)} and answer_matching_behavior {kind_of(answer)}; expected a text and "
                f"{YES!r} or {NO!r}, as in the persona files of anthropics/evals"
            )
        name = row.get("behavior") or Path(place.rpartition(":")[0]).name.partition(".")[0]
        found.setdefault(name, ([], []))[answer == NO].append(question)
    return {name: Behaviour(name, *found[name]) for name in sorted(found)}


TOPICS = "music sport religion science money travel food art politics work family nature".split()
ALIKE = "people often think about it and some say that it matters to them in many ways each day".split()


def made_up(strengths: Sequence[float], count: int = 400, seed: int = 0) -> dict[str, Behaviour]:
    """Behaviours of `count` questions each, half of either class; of a statement's words, `strengths[i]` tell the class of i.

    The telling words are among six of either class, which no other behaviour has.
    """
    rng = random.Random(seed)
    found = {}
    for topic, strength in zip(TOPICS, strengths):
        sides = []
        for side in ("pro", "contra"):
            telling = [f"{topic}{side}{k}" for k in range(6)]
            statements = [
                " ".join(rng.choice(telling if rng.random() < strength else ALIKE) for _ in range(9)) for _ in range(count // 2)
            ]
            sides.append([QUESTION.format(statement=text) for text in statements])
        found[topic] = Behaviour(topic, *sides)
    return found
