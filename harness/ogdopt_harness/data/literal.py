"""Special tokens that a user's text merely writes out ("</s>", "<|im_end|>"): they are text, and never control the model.

A tokenizer cannot tell `</s>` of a template from `</s>` that somebody typed. So what was typed is hidden behind private
characters before the template is filled in, and tokenized by itself, as the plain letters that it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

BASES = (0xF0000, 0xF4000, 0xF8000, 0x100000)
"""Where the private characters begin; another block is taken where a text has such characters itself."""


class Literals:
    """Hides and tokenizes the special tokens of one tokenizer where they stand in a user's text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        names = dict.fromkeys([*tokenizer.all_special_tokens, *added])
        self.specials = sorted((name for name in names if name.strip()), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, self.specials)) or r"(?!)")
        self.places = {name: i for i, name in enumerate(self.specials)}
        self.hidden = re.compile(f"[{''.join(f'{chr(b)}-{chr(b + max(len(names), 1) - 1)}' for b in BASES)}]")

    def count(self, text: str) -> int:
        """How many special tokens a text writes out."""
        return len(self.pattern.findall(text))

    def hide(self, text: str) -> str:
        """The text with a private character in the place of each special token. Raises ValueError where none is free."""
        if not self.pattern.search(text):
            return text
        taken = {ord(found) for found in self.hidden.findall(text)}
        base = next((b for b in BASES if not any(b <= code < b + len(self.specials) for code in taken)), None)
        if base is None:
            raise ValueError("the text has special tokens and characters of every private block; take one kind out")
        return self.pattern.sub(lambda found: chr(base + self.places[found.group()]), text)

    def shown(self, text: str) -> str:
        """The text with its special tokens written out again."""
        return self.hidden.sub(lambda found: self.specials[self._place(found.group())], text)

    def _place(self, character: str) -> int:
        return next(ord(character) - base for base in BASES if 0 <= ord(character) - base < len(self.specials))

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, those of a template's own special tokens included and hidden ones as plain letters."""
        encode = lambda parts: self.tokenizer(parts, add_special_tokens=False, verbose=False).input_ids if parts else []  # noqa: E731
        plain = iter(encode([text for text in texts if not self.hidden.search(text)]))
        return [self._mixed(text) if self.hidden.search(text) else next(plain) for text in texts]

    def _mixed(self, text: str) -> list[int]:
        found: list[int] = []
        at = 0
        for match in self.hidden.finditer(text):
            name = self.specials[self._place(match.group())]
            found += self._plain(text[at : match.start()]) + self.letters[name]
            at = match.end()
        return found + self._plain(text[at:])

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids) if text else []

    @cached_property
    def letters(self) -> dict[str, list[int]]:
        """The ids of each special token's letters: whatever its text is to the tokenizer, it is not that token."""
        return {name: self._letters(name) for name in self.specials}

    def _letters(self, name: str) -> list[int]:
        known = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        for parts in ([name], [name[0], name[1:]], list(name)):
            ids = [i for part in parts if part for i in self._split(part)]
            if ids and not known & set(ids):
                return ids
        unknown = self.tokenizer.unk_token_id
        return [] if unknown is None else [unknown]

    def _split(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids)
