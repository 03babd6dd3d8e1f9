"""Checked rows to token ids, through the tokenizer's chat template: what a row says is what the model sees.

A row is refused where the template leaves out a part of its text. Special tokens that a text merely writes out stay text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ogdopt_harness.common.sources import short
from ogdopt_harness.data.literal import Literals
from ogdopt_harness.data.rows import Message, Problem, Row, RowError, as_messages

THOUGHTS = re.compile(r"<think>.*?</think>", re.S)


class Encoded(NamedTuple):
    """Token ids of a row: the prompt, and one list for each answer; `moved`: the prompt alone has other tokens."""

    prompt: list[int]
    answers: tuple[list[int], ...]
    moved: bool
    literal: bool = False
    """Whether a special token was written out in its text."""
    thoughts: bool = False
    """Whether the template left reasoning of earlier turns out, which models do not see again."""


class Encoder:
    """Rows to token ids, through the tokenizer's chat template if it has one. Raises ValueError without an EOS token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        if not isinstance(eos, int):
            raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no EOS token; set eos_token, or completions never end")
        self.tokenizer = tokenizer
        self.literals = Literals(tokenizer)
        self.templated = tokenizer.chat_template is not None
        self.eos, self.bos = eos, bos if isinstance(bos, int) else None
        self.adds_bos = self.bos is not None and self.bos in tokenizer("a").input_ids[:1]
        self.ids = list(range(len(tokenizer)))  # one int object an id: a token then costs 8 bytes of a list, not 36

    def encode(self, chunk: Sequence[Row | Problem]) -> list[Encoded | Problem]:
        """One result a row. Raises ValueError if a row holds messages and the tokenizer has no chat template."""
        rendered = [row if isinstance(row, Problem) else self.render(row) for row in chunk]
        flat = [text for item in rendered if isinstance(item, list) for text in item]
        tokens = iter(self.literals.ids(flat))
        results: list[Encoded | Problem] = []
        for row, item in zip(chunk, rendered, strict=True):
            if isinstance(item, Problem):
                results.append(item)
                continue
            assert isinstance(row, Row)
            try:
                typed = any(self.literals.hidden.search(text) for text in item)
                thoughts = self.templated and any(THOUGHTS.search(m["content"]) for m in _earlier(row))
                results.append(self.split(row, [next(tokens) for _ in item])._replace(literal=typed, thoughts=thoughts))
            except RowError as problem:
                results.append(problem.at(row.where))
        return results

    def render(self, row: Row) -> list[str] | Problem:
        """The texts to tokenize: the prompt, then the prompt with each answer."""
        if row.prompt is None:
            return ["", *row.answers]
        if not self.templated:
            if not isinstance(row.prompt, str):
                raise ValueError(
                    f"{row.where}: holds messages, but the tokenizer {self.tokenizer.name_or_path!r} has no chat template; "
                    "choose one that has (model.tokenizer_name_or_path), or rows of plain text"
                )
            bos = str(self.tokenizer.bos_token or "")
            opened = bos if bos and row.prompt.startswith(bos) else ""
            prompt = opened + self.literals.hide(row.prompt[len(opened) :])
            return [prompt, *(prompt + self.typed(answer) for answer in row.answers)]
        try:
            asked = as_messages(row.prompt)
            strip = isinstance(row.prompt, str) and asked[0]["content"] != row.prompt  # the turns of a dialogue were stripped
            answers = [answer.strip() if strip else answer for answer in row.answers]
            asked = [{**turn, "content": self.literals.hide(turn["content"])} for turn in asked]
            answers = [self.typed(answer) for answer in answers]
            texts = [self.apply(asked), *(self.apply(asked, answer) for answer in answers)]
            self.complete(asked, answers, texts)
            return texts
        except RowError as problem:
            return problem.at(row.where)
        except TemplateError as error:
            remedy = "change the messages or the tokenizer's template"
            return Problem(row.where, "refused by the chat template", "", str(error) or type(error).__name__, remedy)

    def complete(self, asked: list[Message], answers: list[str], texts: list[str]) -> None:
        """Raises RowError where the template has left out a part of what the row says. White space does not count."""
        said = [(turn["role"], turn["content"], texts[0]) for turn in asked]
        said += [("assistant", answer, text) for answer, text in zip(answers, texts[1:], strict=True)]
        squeezed = {text: "".join(text.split()) for text in texts}
        for i, (role, content, text) in enumerate(said):
            parts = [content]
            if role == "assistant" and i < len(asked):
                parts = [THOUGHTS.sub("", content)]
            if any("".join(part.split()) not in squeezed[text] for part in parts):
                found = f"{role}'s text {short(self.literals.shown(content))}, which it writes only a part of, or nothing"
                remedy = "give the tokenizer a template that keeps it (model.chat_template), or change the row"
                raise RowError("lost in the chat template", "", found, remedy)

    def typed(self, answer: str) -> str:
        """An answer with its special tokens hidden, but for those of its end, which every completion gets anyway."""
        eos, cut = str(self.tokenizer.eos_token), answer
        while cut.rstrip().endswith(eos):
            cut = cut.rstrip().removesuffix(eos)
        return self.literals.hide(cut)

    def apply(self, asked: list[Message], answer: str | None = None) -> str:
        """The templated text: with an answer, or up to where the answer begins."""
        turns = asked if answer is None else [*asked, {"role": "assistant", "content": answer}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None)
        assert isinstance(text, str)
        return text

    def split(self, row: Row, tokens: list[list[int]]) -> Encoded:
        """Prompt and answers, cut apart where the prompt and all full sequences stop to agree. Raises RowError."""
        templated = self.templated and row.prompt is not None
        alone, *full = [self.begin(ids, add=self.adds_bos and not templated) for ids in tokens]
        border = min(common(alone, ids) for ids in full)
        whole = row.prompt is None  # plain text is what the model is to see: a dialogue in it may end its turns itself
        answers = tuple(self.end(ids[border:], whole) for ids in full)
        if len(answers) == 2 and answers[0] == answers[1]:
            found, remedy = f"the same {len(answers[0])} tokens", "expected answers that the tokenizer can tell apart"
            raise RowError("chosen and rejected are identical", "chosen, rejected", found, remedy)
        return Encoded([self.ids[i] for i in full[0][:border]], answers, moved=border < len(alone))

    def begin(self, ids: list[int], add: bool) -> list[int]:
        """The ids with at most one BOS at the start, and with one if `add`."""
        if self.bos is None:
            return ids
        start = next((i for i, token in enumerate(ids) if token != self.bos), len(ids))
        return [self.bos, *ids[start:]] if start or add else ids

    def end(self, ids: list[int], whole: bool = False) -> list[int]:
        """The ids with exactly one EOS, at the end. Of a `whole` text it may stand inside too.

        Raises RowError if there is text after an EOS, or none before it.
        """
        stop = ids.index(self.eos) if self.eos in ids else len(ids)
        if whole:  # it ends where it ends, but for the EOS that it may end with
            last = len(ids) - 1 - ids[::-1].index(self.eos) if self.eos in ids else len(ids)
            stop = last if self.blank(ids[last + 1 :]) else len(ids)
            while stop and ids[stop - 1] == self.eos:
                stop -= 1
        behind = [i for i in ids[stop:] if i != self.eos]  # templates may write a newline after the EOS: nothing to learn
        if not self.blank(behind):
            remedy = f"expected {self.tokenizer.eos_token!r} at the end alone: take it out of the text"
            raise RowError("EOS inside the completion", "", f"{len(behind)} tokens after it", remedy)
        if self.blank(ids[: min(8, stop)]) and self.blank(ids[:stop]):  # eight are mostly enough
            raise RowError("empty completion", "", "no token", "expected an answer that the tokenizer knows a token for")
        return [self.ids[i] for i in (*ids[:stop], self.eos)]

    def blank(self, ids: list[int]) -> bool:
        """Whether the ids stand for nothing but white space."""
        return not str(self.tokenizer.decode(ids)).strip()


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _earlier(row: Row) -> list[Message]:
    """The assistant's turns in the prompt of a row."""
    return [m for m in row.prompt if m["role"] == "assistant"] if isinstance(row.prompt, list) else []
