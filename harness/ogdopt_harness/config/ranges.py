"""The range of every numeric option, in one table, and the one check that goes by it.

`check` walks over a configuration before anything else is done with it. A numeric option without an entry here is a mistake of
ours, which a test finds; one outside of its range is the user's, and is named with what was found and what was expected.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

WHOLE = 2**31 - 1
"""Largest whole number of any option: it fits into 32 bits, as libraries below expect."""


class Range(NamedTuple):
    """Which numbers an option may be; all have to be finite. Of a list or a mapping: each number in it."""

    least: float = -math.inf
    most: float = math.inf
    open: bool = False
    """Whether `least` itself is too small."""
    below: bool = False
    """Whether `most` itself is too large."""
    other: float | None = None
    """One more number, with a meaning of its own."""
    multiple_of: str = ""
    """Another option of the same section that has to divide this one."""
    hint: str = ""
    """What else to do."""

    def holds(self, value: float) -> bool:
        """Whether a number is in the range."""
        if self.other is not None and value == self.other:
            return True
        return (value > self.least if self.open else value >= self.least) and (
            value < self.most if self.below else value <= self.most
        )

    def words(self, values: Iterable[float] = ()) -> str:
        """What is expected, of these values; a bound that nobody comes near is not told of."""
        low = f"more than {self.least:,g}" if self.open else f"{self.least:,g} or more"
        high = f"less than {self.most:,g}" if self.below else f"at most {self.most:,.10g}"
        told = math.isfinite(self.most) and (self.most <= 1 or any(x >= self.most for x in values))
        ends = [text for shown, text in ((math.isfinite(self.least), low), (told, high)) if shown]
        other = "" if self.other is None else f", or {self.other:g}"
        return (" and ".join(ends) or "a finite number") + other


COUNT = Range(1, WHOLE)
SEED = Range(0, WHOLE)
RATE = Range(0, 1e4, open=True)
POSITIVE = Range(0, 1e6, open=True)
ANY = Range(-1e6, 1e6)
SHARE = Range(0, 1)
CONFIDENCE = Range(0, 1, open=True, below=True)
DRAWS = Range(1, 1_000_000)

RANGES: dict[str, dict[str, Range]] = {
    "StudyConfig": {"seeds": SEED},
    "WorldConfig": {
        "seed": SEED,
        "people": Range(4, 1000),
        "sft_conversations": Range(1000, 5_000_000),
        "preference_pairs": Range(1, 1_000_000),
        "newcomers": Range(0, 996),
        "held_out_pairs": Range(1, 1_000_000),
        "items": Range(1, 100_000),
    },
    "LoraConfig": {"r": Range(1, 65_536), "lora_alpha": POSITIVE, "lora_dropout": Range(0, 1, below=True)},
    "ModelConfig": {"vocab_size": Range(1, 2**20)},
    "DataConfig": {"max_length": COUNT, "max_prompt_length": COUNT, "max_train_rows": COUNT, "max_eval_rows": COUNT},
    "StageConfig": {
        "learning_rate": RATE,
        "warmup_steps": Range(0, WHOLE),
        "warmup_ratio": SHARE,
        "num_train_epochs": Range(1, 100_000, hint="a supervised stage is left out by sft.data.train []"),
        "max_steps": Range(1, WHOLE, other=-1),
        "train_batch_size": Range(1, WHOLE, multiple_of="per_device_train_batch_size"),
        "per_device_train_batch_size": COUNT,
        "per_device_train_tokens": COUNT,
        "max_grad_norm": POSITIVE,
        "update_cosine_steps": COUNT,
        "seed": SEED,
        "eval_steps": COUNT,
        "save_steps": COUNT,
        "logging_steps": COUNT,
        "max_skipped_steps": COUNT,
    },
    "EvalConfig": {"limit": COUNT, "batch_size": COUNT, "max_new_tokens": COUNT},
    "SparseConfig": {"learning_rate": RATE, "initial": ANY},
    "PreferenceConfig": {"beta": POSITIVE, "warn_at": POSITIVE, "probe_steps": COUNT},
    "JointConfig": {
        "lambdas": SHARE,
        "evaluate_every": Range(1, WHOLE, other=-1),
        "beta": POSITIVE,
        "train_batch_size": COUNT,
        "objective_rows": COUNT,
        "optima": ANY,
        "optima_epochs": Range(1, 100_000),
        "stop_gap": Range(0, 1e6),
        "stop_pareto": ANY,
    },
    "ReportConfig": {"samples": DRAWS, "confidence": CONFIDENCE},
    "Config": {"threads": Range(1, 1024)},
    "GenerateConfig": {"max_new_tokens": COUNT, "batch_size": COUNT, "limit": COUNT},
    "PairsConfig": {
        "num_return_sequences": Range(1, 10_000),
        "temperature": POSITIVE,
        "top_p": Range(0, 1, open=True),
        "max_new_tokens": COUNT,
        "seed": SEED,
        "limit": COUNT,
    },
    "ReportOptions": {"samples": DRAWS, "confidence": CONFIDENCE},
    "ToyConfig": {"seeds": SEED},
    "Launch": {"world_size": COUNT},
    "SeparationConfig": {"limit": Range(2, WHOLE), "batch_size": COUNT},
    "JudgeConfig": {
        "price": Range(0, 1e6),
        "budget": Range(0, 1e6),
        "limit": COUNT,
        "concurrency": Range(1, 256),
        "max_tokens": Range(1, 1_000_000),
        "expected_tokens": Range(1, 1_000_000),
        "max_retries": Range(0, 1000),
        "timeout": Range(0, 86_400, open=True),
        "backoff": Range(0, 3600),
        "samples": DRAWS,
        "confidence": CONFIDENCE,
    },
}
"""Class of a section -> option -> range. A subclass has its base's as well."""


def ranges_of(section: Any) -> dict[str, Range]:
    """The ranges of one section's options, those of its bases included."""
    kind = section if isinstance(section, type) else type(section)
    return {name: found for base in reversed(kind.__mro__) for name, found in RANGES.get(base.__name__, {}).items()}


def check(config: Any, section: str = "") -> None:
    """Walk over a configuration. Raises ValueError that names every number outside of its range, one a line."""
    if problems := list(_problems(config, section)):
        raise ValueError("\n".join(problems))


def _problems(config: Any, section: str) -> Iterator[str]:
    ranges, dotted = ranges_of(config), f"{section}." if section else ""
    for field in dataclasses.fields(config):
        name, value = f"{dotted}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _problems(value, name)
        elif field.name in ranges:
            optional = "None" in str(field.type)
            yield from _outside(config, name, value, ranges[field.name], optional)
        else:
            yield from (f"{name} is {value!r}; expected finite numbers" for x in numbers(value) if not _finite(x))


def _outside(config: Any, name: str, value: Any, found: Range, optional: bool) -> Iterator[str]:
    """What is wrong with the numbers of one option; at most one line."""
    hint = (", or null" if optional else "") + (f" ({found.hint})" if found.hint else "")
    missing = isinstance(value, bool) or (value is None and not optional)
    if missing or not all(_finite(x) and found.holds(x) for x in numbers(value)):
        yield f"{name} is {value!r}; expected {found.words(numbers(value))}{hint}"
        return
    divisor = getattr(config, found.multiple_of) if found.multiple_of else 1
    if divisor >= 1 and isinstance(value, int) and value % divisor:
        yield f"{name} is {value}; expected a multiple of {found.multiple_of} ({divisor})"


def _finite(number: float) -> bool:
    return isinstance(number, int) or math.isfinite(number)  # a whole number may be too large for a float


def numbers(value: Any) -> Iterator[float]:
    """All numbers in a value, however deep in lists and mappings; no truth values."""
    if isinstance(value, bool):
        return
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, Mapping):
        yield from (x for inner in value.values() for x in numbers(inner))
    elif isinstance(value, (list, tuple)):
        yield from (x for inner in value for x in numbers(inner))
