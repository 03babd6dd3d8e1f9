"""A miniature world: invented people, commonsense, sums and short texts, with training text, pairs and benchmarks.

Everything follows from `WorldConfig` through one `random.Random`: the same configuration gives the same bytes. Words are
separated by single spaces (punctuation too), so that a word-level tokenizer covers the world with a few hundred entries.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from ogdopt_harness.config import ranges
from ogdopt_harness.config.schema import WorldConfig
from ogdopt_harness.data.lexicon import (
    ATTRIBUTES,
    FEELING_QUESTIONS,
    FEELINGS,
    KIND_QUESTIONS,
    KINDS,
    LARGEST_SUMMAND,
    PASSAGE_QUESTIONS,
    PASSAGES,
    SLOTS,
    SUM_QUESTION,
    TOOL_QUESTIONS,
    TOOLS,
    YESNO,
    YESNO_FRAMES,
)

FORMAT = 1
"""Number of the generator's version; a folder written by another one is not taken for this one's."""

OPENERS = {
    "friendly": ("sure friend ,", "of course ,", "happy to help ,"),
    "curt": ("um ,", "ugh ,", "fine then ,"),
}
CLOSERS = {
    "friendly": (". hope this helps !", ". have a nice day !"),
    "curt": (". whatever !", ". now leave !"),
}
STYLES = {"bare": 0.5, "plain": 0.2, "friendly": 0.15, "curt": 0.15}
"""Share of each style among the supervised answers: no style wins before the preference stage."""

MIX = {"facts": 0.18, "kinds": 0.03, "tools": 0.04, "feelings": 0.04, "sums": 0.20, "reading": 0.29, "yesno": 0.22}
"""Share of each family among the supervised conversations (and among the plain statements)."""
PAIR_MIX = {"facts": 0.7, "kinds": 0.15, "tools": 0.15}
"""Share of each family among the preference pairs; the other families never occur there."""
STATEMENTS_PER_CONVERSATION = 0.25
TOLD_OF_A_NEWCOMER = 16
"""Conversations about each fact of a newcomer."""
RAREST = 80.0
"""The most frequent item of a family is about this many times as frequent as the rarest, so that some are barely known."""

MOST_PEOPLE = 1000
MOST_PASSAGES = 1000
"""Most test items about passages: enough other passages must be left to train on."""
YESNO_TESTED, YESNO_INFERRED = 16, 4
"""Test items for each question and answer; so many of them are asked nowhere in training and follow from the word's kind."""
TWO_SENTENCES = 0.12
"""Share of the passages that tell of two people and two things: harder, since names and things must be kept apart."""


@dataclass(frozen=True)
class Item:
    """Something that can be asked, stated and tested: `cloze` followed by `answer` is a true statement."""

    family: str
    name: str
    questions: tuple[str, ...]
    cloze: str
    answer: str
    others: tuple[str, ...]
    """Wrong answers of the same sort."""
    weight: float = 1.0
    """Relative frequency in its family."""
    paired: bool = False
    """May occur in the preference pairs for training."""
    short: str = ""
    """Start of the sentence in a reply, where it differs from `cloze`: what the question says is not said again."""

    @property
    def sentence(self) -> str:
        return f"{self.short or self.cloze} {self.answer}"


@dataclass(frozen=True)
class Family:
    """Items to train on and items to test; a test item's question is no train item's question."""

    train: list[Item]
    test: list[Item]


def make_world(config: WorldConfig, folder: Path) -> dict[str, Any]:
    """Write the world's files into `folder` and return {format, config, files: {name: rows}}, also kept there as world.json.

    The folder appears complete or not at all. A folder that already holds this very world is left alone; raises ValueError
    for a configuration that makes no sense and for a folder that holds something else.
    """
    _check(config)
    folder = Path(folder)
    report: dict[str, Any] = {"format": FORMAT, "config": dataclasses.asdict(config)}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return _existing(folder, report)
    files = _files(config)
    report["files"] = {name: len(rows) for name, rows in files.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, rows in files.items():
            path = scratch / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
        _write_json(scratch / "style.json", style_patterns())
        _write_json(scratch / "world.json", report)
        scratch.chmod(0o755)  # mkdtemp's own mode would hide the folder from other users
        if folder.exists():
            folder.rmdir()
        os.replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return report


def style_patterns() -> dict[str, str]:
    """Regular expressions (for re.search) that recognise the friendly and the curt style by a reply's first words."""
    return {
        f"{name}_pattern": r"^\s*(" + "|".join(opener.rstrip(" ,") for opener in OPENERS[style]) + r")\b"
        for name, style in (("chosen", "friendly"), ("rejected", "curt"))
    }


def _check(config: WorldConfig) -> None:
    ranges.check(config, "world")
    if config.newcomers > MOST_PEOPLE - config.people:
        raise ValueError(
            f"world.newcomers is {config.newcomers}; expected at most {MOST_PEOPLE - config.people} besides world.people "
            f"{config.people}, there are no names for more"
        )


def _existing(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    path = folder / "world.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if {key: found.get(key) for key in report} == report:
            return found
    raise ValueError(f"{folder} exists and does not hold this world (see its world.json); remove it or choose another folder")


def _files(config: WorldConfig) -> dict[str, list[dict[str, Any]]]:
    rng = Random(f"ogdopt world {config.seed}")
    unseen = min(512, config.sft_conversations // 10)
    passages = round(config.sft_conversations * MIX["reading"])
    reading, fresh = _reading(rng, passages, unseen, min(config.items, MOST_PASSAGES))
    families = {
        "facts": _facts(rng, config.people),
        "kinds": _kinds(rng),
        "tools": _associations(rng, "tools", TOOLS, "to {x} people use the", TOOL_QUESTIONS),
        "feelings": _associations(rng, "feelings", FEELINGS, "when you {x} you feel", FEELING_QUESTIONS),
        "sums": _sums(rng),
        "reading": reading,
        "yesno": _yesno(rng),
    }
    # Every item is stated at least once, so that no word of a benchmark is missing from the training text.
    every = [item for name, family in families.items() if name != "reading" for item in family.train]
    files = {
        "sft_train.jsonl": _supervised(rng, families, config.sft_conversations, every),
        "sft_eval.jsonl": _supervised(rng, families | {"reading": fresh}, unseen, []),
        "pairs_train.jsonl": _pairs(rng, families, config.preference_pairs, paired=True),
        "pairs_eval.jsonl": _pairs(rng, families, config.held_out_pairs, paired=False),
        "style_prompts.jsonl": _style_prompts(rng, families, config.items),
    }
    for name, family in families.items():
        files[f"benchmarks/{name}.jsonl"] = _benchmark(rng, family.test, config.items)
    return files | _newcomers(config, families["facts"])


def _newcomers(config: WorldConfig, facts: Family) -> dict[str, list[dict[str, Any]]]:
    """Files about people that nothing else tells of; drawn apart, so that the rest of a world is the same without them."""
    if not config.newcomers:
        return {}
    rng = Random(f"ogdopt world {config.seed} newcomers")
    known = {item.name.rpartition("-")[0] for item in facts.train}
    family = _facts(rng, config.newcomers, known)
    taught = [item for item in family.train for _ in range(TOLD_OF_A_NEWCOMER)]
    rng.shuffle(taught)
    return {
        "newcomers_train.jsonl": [_conversation(rng, item) for item in taught],
        "newcomers_eval.jsonl": [_conversation(rng, item) for item in family.train],
        "benchmarks/newcomers.jsonl": _benchmark(rng, family.test, config.items),
    }


def _apart(rng: Random, items: Sequence[Item]) -> Family:
    """Test every item by one of its phrasings, which its training never uses; each phrasing has its turn."""
    train, test = [], []
    offset = rng.randrange(12)
    for index, item in enumerate(items, offset):
        held_out = item.questions[index % len(item.questions)]
        seen = tuple(question for question in item.questions if question != held_out)
        train.append(dataclasses.replace(item, questions=seen))
        test.append(dataclasses.replace(item, questions=(held_out,)))
    return Family(train, test)


def _skewed(rng: Random, items: Sequence[Item]) -> list[Item]:
    """Give the items frequencies that fall geometrically from 1 to 1 / RAREST, in random order."""
    ranks = list(range(len(items)))
    rng.shuffle(ranks)
    return [
        dataclasses.replace(item, weight=RAREST ** (-rank / max(1, len(items) - 1)))
        for item, rank in zip(items, ranks, strict=True)
    ]


def _half(rng: Random, count: int) -> set[int]:
    return set(rng.sample(range(count), count // 2))


def _facts(rng: Random, people: int, known: Collection[str] = ()) -> Family:
    """Every person has one value for each attribute; each value is that of about as many people. No name is `known`."""
    names = _names(rng, people, known)
    paired = _half(rng, people)
    items = []
    for attribute, (cloze, questions, words) in ATTRIBUTES.items():
        values = words.split()
        rng.shuffle(values)
        values = values[:people]
        dealt = list(itertools.islice(itertools.cycle(values), people))
        rng.shuffle(dealt)
        for index, (name, value) in enumerate(zip(names, dealt, strict=True)):
            asked = tuple(question.format(x=name) for question in questions)
            others = tuple(other for other in values if other != value)
            item = Item("facts", f"{name}-{attribute}", asked, cloze.format(x=name), value, others, paired=index in paired)
            items.append(item)
    return _apart(rng, _skewed(rng, items))


def _names(rng: Random, count: int, known: Collection[str] = ()) -> list[str]:
    """Invented names of two syllables and a consonant, e.g. rador; none is `known` or a word that the world uses otherwise."""
    tables = (*(words for _, _, words in ATTRIBUTES.values()), *KINDS.values(), *TOOLS, *TOOLS.values(), *FEELINGS.values())
    taken = {word for text in tables for word in text.replace("|", " ").split()} | set(known)
    parts = itertools.product("bdfgklmnprstvz", "aeiou", "bdfgklmnprstvz", "aeiou", "lmnrsx")
    return rng.sample([name for name in map("".join, parts) if name not in taken], count)


def _kinds(rng: Random) -> Family:
    table = {kind: "|".join(words.split()) for kind, words in KINDS.items()}
    return _associations(rng, "kinds", table, "{x} is a kind of", KIND_QUESTIONS)


def _associations(rng: Random, family: str, table: dict[str, str], cloze: str, questions: Sequence[str]) -> Family:
    """Items from {answer: "subject|subject|..."}; a random half may occur in pairs."""
    subjects = [(subject, answer) for answer, joined in table.items() for subject in joined.split("|")]
    paired = _half(rng, len(subjects))
    items = [
        Item(
            family,
            subject.replace(" ", "-"),
            tuple(question.format(x=subject) for question in questions),
            cloze.format(x=subject),
            answer,
            tuple(other for other in table if other != answer),
            paired=index in paired,
        )
        for index, (subject, answer) in enumerate(subjects)
    ]
    return _apart(rng, _skewed(rng, items))


def _sums(rng: Random) -> Family:
    """Additions, digit by digit; a held-out sum occurs nowhere in training."""
    couples = list(itertools.product(range(LARGEST_SUMMAND + 1), repeat=2))
    held_out = set(rng.sample(couples, len(couples) // 4))
    train, test = [], []
    for a, b in couples:
        total = a + b
        near = [value for value in range(total - 10, total + 11) if 0 <= value <= 2 * LARGEST_SUMMAND and value != total]
        cloze = f"{_digits(a)} plus {_digits(b)} is"
        question = SUM_QUESTION.format(a=_digits(a), b=_digits(b))
        item = Item("sums", f"{a}-{b}", (question,), cloze, _digits(total), tuple(map(_digits, near)))
        (test if (a, b) in held_out else train).append(item)
    return Family(train, test)


def _digits(number: int) -> str:
    """Two digits as words, so that a small model can learn to add column by column: 7 is "0 7"."""
    return " ".join(f"{number:02d}")


def _reading(rng: Random, train: int, fresh: int, test: int) -> tuple[Family, Family]:
    """Families for training with its test, and for the held-out part: passages whose answer stands there and nowhere else.

    The `fresh` and the `test` passages differ from each other and from the `train` ones, which may repeat.
    """
    held_out: dict[str, Item] = {}
    while len(held_out) < fresh + test:
        item = _passage(rng, f"{len(held_out)}")
        held_out.setdefault(item.questions[0], item)
    items: list[Item] = []
    while len(items) < train:
        item = _passage(rng, f"train-{len(items)}")
        if item.questions[0] not in held_out:
            items.append(item)
    apart = list(held_out.values())
    return Family(items, apart[:test]), Family(apart[test:], [])


def _passage(rng: Random, name: str) -> Item:
    size = 2 if rng.random() < TWO_SENTENCES else 1
    drawn = {slot: rng.sample(words.split(), size) for slot, words in SLOTS.items()}
    told = [{slot: values[index] for slot, values in drawn.items()} for index in range(size)]
    passage = " ".join(rng.choice(PASSAGES).format(**event) for event in told)
    slot, event = rng.choice(list(SLOTS)), rng.choice(told)
    question, start = (text.format(**event) for text in PASSAGE_QUESTIONS[slot])
    tempting = [value for value in drawn[slot] if value != event[slot]]
    absent = [value for value in SLOTS[slot].split() if value not in drawn[slot]]
    others = (*tempting, *rng.sample(absent, 3 - len(tempting)))
    return Item("reading", name, (f"{passage} {question}",), f"{passage} {start}", event[slot], others, short=start)


def _yesno(rng: Random) -> Family:
    """What is true of a word because of its kind: as many answers are yes as no, in training and in the test."""
    train, test = [], []
    for number, (question, sides) in enumerate(YESNO.items()):
        for answer, other, kinds in zip(("yes", "no"), ("no", "yes"), sides, strict=True):
            items = []
            for word in [word for kind in kinds.split() for word in KINDS[kind].split()]:
                text = question.format(x=word)
                asked = tuple(frame.format(x=text) for frame in YESNO_FRAMES)
                start = "the answer is"
                items.append(Item("yesno", f"{word}-{number}", asked, f"{text} {start}", answer, (other,), short=start))
            side = _apart(rng, _skewed(rng, items))
            tested = rng.sample(side.test, YESNO_TESTED)
            inferred = {item.name for item in tested[:YESNO_INFERRED]}
            taught = [item for item in side.train if item.name not in inferred]
            total = sum(item.weight for item in taught)
            train += [dataclasses.replace(item, weight=item.weight / total) for item in taught]
            test += tested
    return Family(train, test)


def _supervised(rng: Random, families: dict[str, Family], conversations: int, stated: Sequence[Item]) -> list[dict[str, Any]]:
    """Conversations, and plain statements: those of `stated` and further ones as often as the families are talked about."""
    rows = [_conversation(rng, item) for item in _draw(rng, families, MIX, conversations)]
    further = max(0, round(conversations * STATEMENTS_PER_CONVERSATION) - len(stated))
    rows += [{"text": f"{item.cloze} {item.answer} ."} for item in (*stated, *_draw(rng, families, MIX, further))]
    rng.shuffle(rows)
    return rows


def _conversation(rng: Random, item: Item) -> dict[str, Any]:
    return {"messages": [_user(rng.choice(item.questions)), _assistant(_supervised_answer(rng, item))]}


def _draw(rng: Random, families: dict[str, Family], mix: dict[str, float], count: int, **only: bool) -> list[Item]:
    """Draw items by family and frequency; with paired=... only those in (or not in) the paired half."""
    pools = {
        name: [item for item in families[name].train if all(getattr(item, key) == value for key, value in only.items())]
        for name in mix
    }
    weights = {name: list(itertools.accumulate(item.weight for item in pool)) for name, pool in pools.items()}
    names = rng.choices(list(mix), weights=list(mix.values()), k=count)
    return [rng.choices(pools[name], cum_weights=weights[name])[0] for name in names]


def _supervised_answer(rng: Random, item: Item) -> str:
    style = rng.choices(list(STYLES), weights=list(STYLES.values()))[0]
    if style == "bare":
        return item.answer
    return f"{item.sentence} ." if style == "plain" else _styled(rng, style, item)


def _styled(rng: Random, style: str, item: Item) -> str:
    return f"{rng.choice(OPENERS[style])} {item.sentence} {rng.choice(CLOSERS[style])}"


def _pairs(rng: Random, families: dict[str, Family], count: int, paired: bool) -> list[dict[str, Any]]:
    """The same fact told in the friendly (chosen) and in the curt style (rejected); the style comes first and last."""
    return [
        {
            "prompt": [_user(rng.choice(item.questions))],
            "chosen": [_assistant(_styled(rng, "friendly", item))],
            "rejected": [_assistant(_styled(rng, "curt", item))],
        }
        for item in _draw(rng, families, PAIR_MIX, count, paired=paired)
    ]


def _style_prompts(rng: Random, families: dict[str, Family], count: int) -> list[dict[str, Any]]:
    """Different questions about what never occurs in the pairs for training."""
    pool = [question for name in PAIR_MIX for item in families[name].train if not item.paired for question in item.questions]
    return [{"prompt": question} for question in rng.sample(pool, min(count, len(pool)))]


def _benchmark(rng: Random, test: Sequence[Item], count: int) -> list[dict[str, Any]]:
    rows = []
    for item in rng.sample(list(test), min(count, len(test))):
        choices = [item.answer, *rng.sample(item.others, min(3, len(item.others)))]
        rng.shuffle(choices)
        rows.append(
            {
                "id": f"{item.family}-{item.name}",
                "question": item.questions[0],
                "choices": choices,
                "answer": choices.index(item.answer),
                "cloze": item.cloze,
            }
        )
    return rows


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8", newline="\n")
