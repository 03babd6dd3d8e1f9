"""Data as a person reads it: examples as text with the loss positions marked, and how long the sequences are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ogdopt_harness.data.examples import Example, Preferences, collate

WIDTH = 360  # characters kept at each end of a long text
BARS = 10
OPEN, CLOSE = "⟦", "⟧"


def groups(found: Preferences) -> list[tuple[Example, ...]]:
    """Pairs as pairs, unpaired examples one by one."""
    if found.paired:
        return list(zip(found.winners, found.losers, strict=True))
    return [(example,) for example in (*found.winners, *found.losers)]


def marked(tokenizer: Any, example: Example, on_prompt: bool) -> str:
    """An example as text, what the loss looks at between brackets, the middle of long parts left out."""
    batch = collate([example], tokenizer.pad_token_id, on_prompt)
    ids, scored = batch.input_ids[0].tolist(), batch.loss_mask[0].tolist()
    out, start = [], 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or scored[end] != scored[start]:
            text = shortened(tokenizer.decode(ids[start:end]))
            out.append(f"{OPEN}{text}{CLOSE}" if scored[start] else text)
            start = end
    return "".join(out).replace("\n", "\n    ")


def shortened(text: str) -> str:
    """The start and the end of a text.

    >>> len(shortened("x" * 5000)) < 1000
    True
    """
    if len(text) <= 2 * WIDTH:
        return text
    return f"{text[:WIDTH]} [... {len(text) - 2 * WIDTH:,} characters ...] {text[-WIDTH:]}"


def histogram(sizes: Sequence[int], unit: str) -> str:
    """Bars of equal width in size, and the quantiles.

    >>> print(histogram([1, 1, 2], "tokens").splitlines()[-1])
      median 1, 90% up to 2, 99% up to 2, longest 2 tokens
    """
    if not sizes:
        return "  no row"
    ordered = sorted(sizes)
    width = max(1, math.ceil((ordered[-1] + 1) / BARS))
    counts = [0] * (ordered[-1] // width + 1)
    for value in ordered:
        counts[value // width] += 1
    lines = [
        f"  {i * width:>7,}-{(i + 1) * width - 1:<7,} {'#' * math.ceil(40 * count / max(counts)):<40} {count:,}"
        for i, count in enumerate(counts)
    ]
    at = [ordered[min(len(ordered) - 1, math.ceil(q * len(ordered)) - 1)] for q in (0.5, 0.9, 0.99)]
    lines.append(f"  median {at[0]:,}, 90% up to {at[1]:,}, 99% up to {at[2]:,}, longest {ordered[-1]:,} {unit}")
    return "\n".join(lines)
