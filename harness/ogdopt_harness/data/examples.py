"""Rows become token sequences: templated, tokenized, length-limited, ordered, collated; and what was left out is reported.

Prompt and prompt + completion are tokenized as the model will see them and split at their common prefix of token ids, because
a token may reach across the border. Every completion ends with exactly one end-of-sequence token, except one that a length
limit cut, which the report counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ogdopt_harness.config.schema import DataConfig
from ogdopt_harness.data.encode import Encoded, Encoder
from ogdopt_harness.data.rows import Problem, Row, RowError, as_messages, rows

Part = Literal["train", "eval"]
Kind = Literal["sft", "joint", "preference"]
CHUNK = 256  # rows tokenized in one call, which a fast tokenizer spreads over the cores
MOST_AT_ONCE = 4_000_000  # characters tokenized in one call
SHOWN = 10  # problems listed in an error
KEPT = 3  # places kept of each reason, in the report and in an error


@dataclass(frozen=True)
class Example:
    """One sequence of token ids. The completion ends with the end-of-sequence token unless it was cut."""

    prompt_ids: list[int]
    completion_ids: list[int]


@dataclass(frozen=True)
class Pair:
    """One prompt with a preferred and a rejected completion."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def chosen(self) -> Example:
        """The prompt with the preferred completion."""
        return Example(self.prompt_ids, self.chosen_ids)

    @property
    def rejected(self) -> Example:
        """The prompt with the rejected completion."""
        return Example(self.prompt_ids, self.rejected_ids)


@dataclass(frozen=True)
class Preferences:
    """Chosen (winners) and rejected (losers); if `paired`, winners[i] and losers[i] answer the same prompt."""

    winners: list[Example]
    losers: list[Example]
    paired: bool


@dataclass
class Note:
    """How often something happened, and the first places where it did."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        """Count one more, and keep its place if it is among the first."""
        self.count += 1
        if len(self.places) < KEPT:
            self.places.append(place)


@dataclass(frozen=True)
class DataReport:
    """What became of the rows: `read` = `used` + the dropped ones; `noted` counts what happened to rows that are used."""

    option: str
    read: int
    used: int
    tokens: int
    longest: int
    formats: dict[str, int]
    dropped: dict[str, Note]
    noted: dict[str, Note]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain dictionaries, for JSON."""
        plain = {name: getattr(self, name) for name in ("option", "read", "used", "tokens", "longest", "formats")}
        for name in ("dropped", "noted"):
            plain[name] = {reason: {"count": n.count, "places": n.places} for reason, n in getattr(self, name).items()}
        return plain

    def summary(self) -> str:
        """One line of totals, then one line for each reason."""
        formats = ", ".join(f"{count:,} {name}" for name, count in self.formats.items())
        size = f"{self.tokens:,} tokens, longest {self.longest:,}"
        lines = [f"{self.option}: {self.used:,} of {self.read:,} rows used ({formats}), {size}"]
        for verb, notes in (("left out", self.dropped), ("used", self.noted)):
            for reason, note in notes.items():
                more = ", ..." if note.count > len(note.places) else ""
                lines.append(f"  {verb}, {reason}: {note.count:,} ({', '.join(note.places)}{more})")
        return "\n".join(lines)


def load_sft(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, part: Part, kind: Literal["sft", "joint"] = "sft"
) -> tuple[list[Example], DataReport]:
    """The supervised examples of `config.train` or `config.eval`: last answers of conversations, completions, or plain texts.

    Raises ValueError if a source or a row cannot be used (`on_bad_row: error`), or if no row is left.
    """
    loader = Loader(config, tokenizer, part, kind)
    examples = [example for _, (example,) in loader.sequences()]
    return examples, loader.finish(examples)


def load_preferences(config: DataConfig, tokenizer: PreTrainedTokenizerBase, part: Part) -> tuple[Preferences, DataReport]:
    """The preferred and rejected examples of `config.train` or `config.eval`, from paired or from labelled rows.

    Raises ValueError as `load_sft` does, if rows of both kinds are mixed, and if one side has no example.
    """
    loader = Loader(config, tokenizer, part, "preference")
    winners: list[Example] = []
    losers: list[Example] = []
    for label, examples in loader.sequences():
        if label is None:
            winners.append(examples[0])
            losers.append(examples[1])
        else:
            (winners if label else losers).append(examples[0])
    report = loader.finish([*winners, *losers])
    if len(report.formats) > 1:
        raise ValueError(
            f"{report.option} mixes {' and '.join(report.formats)} rows; expected one kind, pairs or labelled completions"
        )
    if not winners or not losers:
        raise ValueError(f"{report.option}: every label is {bool(winners)}; expected preferred and rejected completions")
    return Preferences(winners, losers, paired="chosen/rejected" in report.formats), report


def texts(config: DataConfig, part: Part, kind: Kind) -> Iterator[str]:
    """The text of every usable row, messages joined by newlines, to train a tokenizer on; the loaders name the other rows."""
    for row in rows(config, part, kind):
        if isinstance(row, Problem):
            continue
        try:
            prompt = [] if row.prompt is None else [message["content"] for message in as_messages(row.prompt)]
        except RowError:
            continue
        yield "\n".join((*prompt, *row.answers))


def _chunk(source: Iterator[Row | Problem]) -> Iterator[Row | Problem]:
    """The next rows to tokenize together: `CHUNK` of them, fewer where they are long."""
    characters = 0
    for row in islice(source, CHUNK):
        yield row
        if isinstance(row, Row):
            prompt = row.prompt if isinstance(row.prompt, str) else "".join(m["content"] for m in row.prompt or ())
            characters += len(prompt) + sum(map(len, row.answers))
        if characters > MOST_AT_ONCE:
            return


def order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n rows in an epoch: a pure function, so that (epoch, position) is all a resumed run has to know."""
    return np.random.default_rng([seed, epoch]).permutation(n).tolist()


class Batch(NamedTuple):
    """Right-padded sequences, each (B, T): token ids, 1 where there is a token, True where the token is scored."""

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def collate(examples: Sequence[Example], pad_id: int, train_on_prompt: bool = False) -> Batch:
    """The examples as one batch. Scored are the completions, or with `train_on_prompt` all tokens; never the first of a
    sequence, which nothing predicts. Masks follow from lengths, so that `pad_id` may be the end-of-sequence token."""
    if not examples:
        raise ValueError("collate got no examples; expected at least one")
    lengths = [len(example.prompt_ids) + len(example.completion_ids) for example in examples]
    shape = len(examples), max(lengths)
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    for i, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        input_ids[i, :length] = torch.tensor(example.prompt_ids + example.completion_ids, dtype=torch.long)
        attention_mask[i, :length] = 1
        loss_mask[i, 1 if train_on_prompt else max(1, len(example.prompt_ids)) : length] = True
    return Batch(input_ids, attention_mask, loss_mask)


def mismatched(data: Preferences) -> list[Example]:
    """Each prompt, chosen's and rejected's, with the completion of the row after it, cut to the longest row there is.

    Their log-ratios are the policy's divergence from its reference on answers that nobody prefers (Ethayarajh et al. 2024).
    """
    rows = [*data.winners, *data.losers]
    longest = max(len(row.prompt_ids) + len(row.completion_ids) for row in rows)
    following = [*rows[1:], rows[0]]
    return [Example(a.prompt_ids, b.completion_ids[: longest - len(a.prompt_ids)]) for a, b in zip(rows, following)]


class Loader:
    """One pass over the rows of one option: encodes them and keeps account of what happens to each."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, part: Part, kind: Kind) -> None:
        self.config, self.part, self.kind = config, part, kind
        self.option = f"{kind}.data.{part}"
        self.encoder = Encoder(tokenizer)
        self.read = self.used = 0
        self.formats: dict[str, int] = {}
        self.dropped: dict[str, Note] = {}
        self.stopping: dict[str, Note] = {}  # as dropped, for problems that let no training begin
        self.first: list[Problem] = []  # of the stopping ones, or of the dropped while there are none
        self.noted: dict[str, Note] = {}
        if config.on_long_row == "truncate" and not 1 <= config.max_prompt_length < config.max_length:
            raise ValueError(
                f"{kind}.data: max_prompt_length is {config.max_prompt_length} and max_length {config.max_length}; "
                "with on_long_row: truncate the first must be smaller, or nothing is left for the completion"
            )

    def sequences(self) -> Iterator[tuple[bool | None, tuple[Example, ...]]]:
        """(label, examples that share a prompt) of every usable row, in order."""
        source = rows(self.config, self.part, self.kind)
        while chunk := list(_chunk(source)):
            self.read += len(chunk)
            for row, encoded in zip(chunk, self.encoder.encode(chunk), strict=True):
                if isinstance(encoded, Problem):
                    self.drop(encoded, self.config.on_bad_row == "error")
                elif (examples := self.limit(row.where, encoded)) is not None:
                    assert isinstance(row, Row)
                    self.used += 1
                    for what in row.noted:
                        self.note(what, row.where)
                    self.formats[row.format] = self.formats.get(row.format, 0) + 1
                    yield row.label, examples

    def limit(self, where: str, encoded: Encoded) -> tuple[Example, ...] | None:
        """The row's examples within the length limits, or None if the row is left out."""
        config, prompt, answers = self.config, encoded.prompt, encoded.answers
        longest = max(map(len, answers))
        fits = len(prompt) <= config.max_prompt_length, len(prompt) + longest <= config.max_length
        if not all(fits) and config.on_long_row != "truncate":
            name, length = ("max_length", len(prompt) + longest) if fits[0] else ("max_prompt_length", len(prompt))
            limit = f"{name} {getattr(config, name)}"
            remedy = f"raise {name}, or choose `on_long_row: drop` or `truncate`"
            self.drop(Problem(where, f"longer than {limit}", "", f"{length} tokens", remedy), config.on_long_row == "error")
            return None
        if not fits[0]:
            kept = prompt[len(prompt) - config.max_prompt_length :]
            prompt = [self.encoder.bos, *kept[1:]] if prompt[0] == self.encoder.bos else kept  # a BOS stays where it was
        room = config.max_length - len(prompt)
        cut = [answer[:room] for answer in answers]
        if len(cut) == 2 and cut[0] == cut[1]:
            remedy = "raise max_length: what differs comes after it"
            problem = Problem(where, "chosen and rejected are identical once cut", "", f"{room} equal tokens", remedy)
            self.drop(problem, stop=False)
            return None
        if not fits[0]:
            self.note("prompt cut at its start", where)
        if longest > room:
            self.note("completion cut, ends without EOS", where)
        if encoded.literal:
            self.note("special tokens written out, which are taken as text", where)
        if encoded.thoughts:
            self.note("reasoning of earlier turns, which the chat template leaves out", where)
        if encoded.moved:
            self.note("prompt tokens change next to the completion", where)
        return tuple(Example(prompt, answer) for answer in cut)

    def drop(self, problem: Problem, stop: bool) -> None:
        """Account for a row that is left out, or that stops the run."""
        if stop and not self.stopping:
            self.first = []
        note = (self.stopping if stop else self.dropped).setdefault(problem.reason, Note())
        note.add(problem.where)
        if (stop or not self.stopping) and note.count <= KEPT and len(self.first) < SHOWN:
            self.first.append(problem)

    def note(self, what: str, where: str) -> None:
        """Account for what happened to a row that is used."""
        self.noted.setdefault(what, Note()).add(where)

    def finish(self, examples: Sequence[Example]) -> DataReport:
        """The report. Raises one ValueError with the first problems and all counts if a row stops the run or none is left."""
        if self.stopping or not self.used:
            raise ValueError(self.complaint())
        lengths = [len(example.prompt_ids) + len(example.completion_ids) for example in examples]
        return DataReport(self.option, self.read, self.used, sum(lengths), max(lengths), self.formats, self.dropped, self.noted)

    def complaint(self) -> str:
        """The message of the one error: first problems, counts, what to do."""
        notes = self.stopping or self.dropped
        counts = ", ".join(f"{note.count} {reason}" for reason, note in notes.items())
        unusable = sum(note.count for note in notes.values())
        unused = f"{unusable} of {self.read} rows cannot be used" if self.read else "no row found"
        lines = [f"{self.option}: {unused}"]
        lines += [f"  {problem}" for problem in self.first]
        lines += ["  ..."] if unusable > len(self.first) else []
        lines += [f"in all: {counts}"] if counts else []
        if not self.used and counts:
            lines.append("no row is left to train on or to measure")
        elif self.stopping:
            long = [reason.startswith("longer than") for reason in self.stopping]
            options = ["on_bad_row: skip"] * (not all(long)) + ["on_long_row: drop"] * any(long)
            skip = " and ".join(f"`{self.kind}.data.{option}`" for option in options)
            lines.append(f"correct these rows, or leave them out with {skip}")
        return "\n".join(lines)
