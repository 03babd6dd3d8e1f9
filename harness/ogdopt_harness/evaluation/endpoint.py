"""A language model at an OpenAI-compatible endpoint: asked with patience, never paid twice, never beyond a limit.

The key comes from the environment (`OPENAI_API_KEY`; a server of your own needs none) and goes nowhere else: what a server says
about a failure is shown without it.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import ipaddress
import json
import os
import random
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from ogdopt_harness.common.journal import Journal

Messages = Sequence[dict[str, str]]
KEY = "OPENAI_API_KEY"
PATIENCE = 60.0  # longest wait before another attempt, seconds
MOST_BYTES = 8_000_000
"""Of a server's answer."""
PART = 6
"""Letters and digits of a key in a row that are not shown."""
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
    allow_http: bool = False
    """Whether another machine may be asked over plain http, which shows the key to everyone on the way."""
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
        self.secrets = [self.secret, *check_address(self.base_url, self.allow_http)]
        self.client = openai.OpenAI(
            api_key=self.secret or "none",
            base_url=self.base_url,
            max_retries=0,
            timeout=self.timeout,
            # A server may send the key and the texts of its users elsewhere, or an answer without end.
            http_client=bounded_client(self.timeout),
        )
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
                if 300 <= error.status_code < 400:
                    raise ValueError(
                        self._said(
                            f"{self.model}: the server sends its users to {error.response.headers.get('location', '?')}; "
                            "nothing was sent there: give that address with --base_url if you trust it"
                        )
                    ) from None
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
        """A server may repeat the key that it refuses, whole or in parts."""
        return " ".join(masked(text, self.secrets).split())[:600]


def bounded_client(timeout: float) -> Any:
    """A client for `openai` that reads answers up to `MOST_BYTES` and follows nobody to another address."""
    used = vars(importlib.import_module("openai._base_client"))  # versions of openai differ in the library that they use
    httpx: Any = used.get("httpx2") or used["httpx"]

    class Limited(httpx.SyncByteStream):
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __iter__(self) -> Iterator[bytes]:
            size = 0
            for block in self.stream:
                size += len(block)
                if size > MOST_BYTES:
                    raise httpx.ReadError(f"the server's answer has more than {MOST_BYTES:,} bytes")
                yield block

        def close(self) -> None:
            self.stream.close()

    class Bounded(httpx.HTTPTransport):
        def handle_request(self, request: Any) -> Any:
            response = super().handle_request(request)
            response.stream = Limited(response.stream)
            return response

    return httpx.Client(transport=Bounded(), timeout=timeout, follow_redirects=False)


def check_address(base_url: str | None, allow_http: bool) -> list[str]:
    """The secrets in an address (`https://user:password@host`).

    Raises ValueError for what is no address, and for plain http to another machine unless that is allowed.
    """
    if base_url is None:
        return []
    try:
        parts = urlsplit(base_url)
        host, secrets = parts.hostname or "", [part for part in (parts.password, parts.username) if part]
    except ValueError as error:
        raise ValueError(f"base_url is no address ({error}); expected e.g. https://host:8000/v1") from None
    shown = masked(base_url, secrets)
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(f"base_url is {shown!r}; expected an address such as http://localhost:8000/v1")
    if parts.scheme == "http" and not allow_http and not _local(host):
        raise ValueError(
            f"base_url is {shown!r}: plain http to another machine shows the key and all texts to everyone on the way; "
            "expected https, or say --allow_http true"
        )
    return secrets


def _local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def masked(text: str, secrets: Sequence[str]) -> str:
    """The text without secrets, also where they are broken up, cut, quoted or encoded; and without those of any address.

    >>> masked("no such key: sk-abc def 123-456", ["sk-abcdef123456"])
    'no such key: ***'
    """
    text = re.sub(r"(?<=://)[^/@\s]+@", "***@", text)
    for secret in filter(None, secrets):
        for form in (secret, quote(secret, safe=""), base64.b64encode(secret.encode()).decode()):
            text = text.replace(form, "***")
        text = _without_parts(text, secret)
    return text


def _without_parts(text: str, secret: str) -> str:
    """The text without runs of `PART` or more letters and digits of the secret, whatever stands between these."""
    places = [i for i, letter in enumerate(text) if letter.isalnum()]
    plain, whole = "".join(text[i] for i in places).lower(), "".join(filter(str.isalnum, secret)).lower()
    size, hidden = min(PART, len(whole)), set()
    for start in range(len(plain) - size + 1 if size else 0):
        if plain[start : start + size] in whole:
            hidden.update(range(places[start], places[start + size - 1] + 1))
    shown = "".join("\0" if i in hidden else letter for i, letter in enumerate(text))
    return re.sub("(sk-)?\0+", "***", shown)
