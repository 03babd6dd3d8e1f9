"""A language model at an OpenAI-compatible endpoint: asked with patience, never paid twice, never beyond a limit.

The key comes from the environment (`OPENAI_API_KEY`; a server of your own needs none) and goes nowhere else: what a server says
about a failure is shown without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ogdopt_harness.common.journal import Journal

Messages = Sequence[dict[str, str]]
KEY = "OPENAI_API_KEY"
PATIENCE = 60.0  # longest wait before another attempt, seconds
RETRIED = (408, 409, 429)  # besides 500 and above
LETTERS = 4  # of English a token, for an estimate
BYTES = 2  # a token at least, for a limit; English has four, Chinese three or more


class Prices(NamedTuple):
    """US dollars for a million tokens."""

    input: float
    output: float


# List prices of the judges of the OGD paper (appendix A.2), as published when they came out.
PRICES = {
    "gpt-4o-mini-2024-07-18": Prices(0.15, 0.60),
    "gpt-4o-2024-08-06": Prices(2.50, 10.0),
    "gpt-4-1106-preview": Prices(10.0, 30.0),
}


class SpentError(ValueError):
    """The limit does not allow for another question."""


class RefusedError(ValueError):
    """The server will not answer this question (too long, filtered); others it may."""


@dataclass
class Endpoint:
    """Asks `model`, greedily; answers are kept in `journal`, and taken from there when the same is asked again.

    `limit` is in dollars: a question that might go beyond it, with an answer of `max_tokens`, is not asked (SpentError).
    """

    model: str
    journal: Journal
    prices: Prices
    base_url: str | None = None
    max_tokens: int = 1024
    max_retries: int = 6
    timeout: float = 120.0
    limit: float | None = None
    backoff: float = 0.5
    """Seconds before the second attempt; doubled each time, up to a minute. A server's Retry-After counts more."""
    usage: list[int] = field(default_factory=lambda: [0, 0])
    """Tokens read and written by the model, of answers that were paid for now."""

    def __post_init__(self) -> None:
        try:
            import openai  # imported here: an optional extra
        except ImportError as error:
            raise ValueError(
                "a judge needs the library openai: pip install openai (or this project's extra 'judge')"
            ) from error
        self.openai = openai
        self.secret = os.environ.get(KEY, "")
        if not self.secret and self.base_url is None:
            raise ValueError(f"the environment has no {KEY}; set it, or name a server of your own with --base_url")
        self.client = openai.OpenAI(api_key=self.secret or "none", base_url=self.base_url, max_retries=0, timeout=self.timeout)
        self.lock, self.reserved = threading.Lock(), 0.0

    def id_of(self, messages: Messages) -> str:
        """The key of a question in the journal: equal where model, options and messages are."""
        asked = {"model": self.model, "max_tokens": self.max_tokens, "temperature": 0, "messages": list(messages)}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    @property
    def spent(self) -> float:
        """Dollars, by the tokens that the server counted."""
        return (self.usage[0] * self.prices.input + self.usage[1] * self.prices.output) / 1e6

    def most(self, messages: Messages) -> float:
        """Dollars that an answer costs at most."""
        size = sum(len(message["content"].encode("utf-8", "replace")) for message in messages)
        return (size / BYTES * self.prices.input + self.max_tokens * self.prices.output) / 1e6

    def ask(self, messages: Messages) -> str:
        """The answer. Raises SpentError at the limit, RefusedError for this question alone, ValueError for lasting failure."""
        key = self.id_of(messages)
        if key in self.journal:
            return self.journal[key]["answer"]
        most = self.most(messages)
        with self.lock:
            if self.limit is not None and self.spent + self.reserved + most > self.limit:
                raise SpentError(
                    f"${self.spent:.2f} are spent and another answer might go beyond the limit of ${self.limit:.2f}; what was "
                    "answered is kept: the same command with a higher --budget goes on from there"
                )
            self.reserved += most
        try:
            answer, reason, (read, written) = self._patiently(messages)
        finally:
            with self.lock:
                self.reserved -= most
        with self.lock:
            self.usage[0] += read
            self.usage[1] += written
        self.journal.add([{"id": key, "answer": answer, "finish_reason": reason, "usage": [read, written]}])
        return answer

    def _patiently(self, messages: Messages) -> tuple[str, str, tuple[int, int]]:
        for attempt in range(self.max_retries + 1):
            try:
                return self._once(messages)
            except self.openai.APIStatusError as error:
                if error.status_code < 500 and error.status_code not in RETRIED:
                    kind = RefusedError if error.status_code in (400, 413, 422) else ValueError
                    raise kind(self._said(f"{self.model} refuses: {error}")) from None
                failure, wanted = error, error.response.headers.get("retry-after", "")
            except (self.openai.APIError, ValueError, TypeError, AttributeError, IndexError, OSError) as error:
                failure, wanted = error, ""  # no connection, too late, cut off, or not what a server should say
            if attempt < self.max_retries:
                time.sleep(self._wait(attempt, wanted))
        raise ValueError(
            self._said(
                f"{self.model} failed {self.max_retries + 1} times, at last with {type(failure).__name__}: {failure}; what was "
                "answered is kept: try the same command again later"
            )
        ) from None

    def _once(self, messages: Messages) -> tuple[str, str, tuple[int, int]]:
        asked: Any = list(messages)
        found: Any = self.client.chat.completions.create(
            model=self.model,
            messages=asked,
            temperature=0,
            max_tokens=self.max_tokens,
        )
        choice = found.choices[0]
        if not isinstance(choice.message.content, str):
            raise TypeError("an answer without a text")
        letters = sum(len(message["content"]) for message in messages), len(choice.message.content)
        read, written = (getattr(found.usage, f"{side}_tokens", None) for side in ("prompt", "completion"))
        counts = (letters[0] // LETTERS if read is None else read, letters[1] // LETTERS if written is None else written)
        return choice.message.content, str(choice.finish_reason), counts

    def _wait(self, attempt: int, wanted: str) -> float:
        try:
            return min(PATIENCE, max(0.0, float(wanted)))
        except ValueError:  # none, or a date
            return min(PATIENCE, self.backoff * 2**attempt) * random.uniform(0.5, 1.5)

    def _said(self, text: str) -> str:
        """A server may repeat the key that it refuses."""
        return " ".join((text.replace(self.secret, "***") if self.secret else text).split())[:600]
