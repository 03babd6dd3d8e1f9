"""The options of commands, apart from a study's configuration: dataclasses, whose fields are options."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from ogdopt_harness.config import ranges
from ogdopt_harness.config.schema import check_device

ROW = "row"
"""The source of an answer that is the row's own, in `ogdopt pairs`."""


@dataclass(frozen=True)
class GenerateConfig:
    """What is asked of whom, and where the answers go."""

    output_dir: str
    """Folder of answers.jsonl and of the benchmark's file."""
    format: Literal["arena_hard", "arena_hard_2024", "wildbench", "alpaca_eval", "prompts"] = "prompts"
    name: str | None = None
    """The model's name in the benchmark's files; null: the last folders of its path."""
    max_new_tokens: int = 4096
    """Longest answer in tokens; less where the model cannot read that many after the prompt."""
    batch_size: int = 16
    backend: Literal["auto", "vllm", "transformers"] = "auto"
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer with its chat template; null: the model's own."""
    token_counter: Literal["tiktoken", "model"] = "tiktoken"
    """Who counts the tokens of an answer that Arena-Hard's style control goes by: tiktoken, as its own scripts, or the model's
    tokenizer."""
    split: str = "test"
    """Split of a hub data set of prompts."""
    limit: int | None = None
    """Only the first so many prompts."""
    device: str = "auto"

    def __post_init__(self) -> None:
        ranges.check(self)
        check_device(self.device)


@dataclass(frozen=True)
class JudgeConfig:
    """Who judges, and at what price."""

    judge: str = "gpt-4o-mini-2024-07-18"
    """The judge's model name; the paper chooses epochs with this one (appendix A.2)."""
    base_url: str | None = None
    """Address of another OpenAI-compatible server, e.g. http://localhost:8000/v1; null: OpenAI's."""
    allow_http: bool = False
    """Whether `base_url` may be plain http to another machine, which shows the key to everyone on the way."""
    price: list[float] | None = None
    """Dollars for a million input and output tokens, e.g. [0.15, 0.6]. null: the list price of the paper's judges, or nothing
    for a server of your own."""
    budget: float = 1.0
    """Dollars that may be spent: an estimate above it needs --yes, and nothing is asked that might go beyond it."""
    yes: bool = False
    """Spend what the estimate says, also above the budget: never more than the "at most" that it names."""
    cache: str = "runs/judge_cache.jsonl"
    """Answers of judges, so that nothing is paid twice."""
    limit: int | None = None
    """Only the first so many prompts."""
    concurrency: int = 8
    max_tokens: int = 1024
    """Longest answer of the judge."""
    expected_tokens: int = 300
    """What an answer counts for in the estimate."""
    max_retries: int = 6
    timeout: float = 120.0
    """Seconds that an answer may take."""
    backoff: float = 0.5
    """Seconds before a second attempt; doubled each time."""
    samples: int = 10_000
    """Bootstrap draws."""
    confidence: float = 0.95

    def __post_init__(self) -> None:
        ranges.check(self)


@dataclass(frozen=True)
class PairsConfig:
    """Where the two answers come from, how samples are drawn, and who says which is better."""

    output_dir: str
    """Folder of samples-<model>.jsonl and pairs.jsonl."""
    chosen: str
    """Source of the chosen answers: `row`, or a model's folder or hub id."""
    rejected: str
    """Source of the rejected answers, likewise."""
    score: str
    """Who scores a sample. `answer`: 1 if it names the row's `answer`, else 0. `scores:FILE`: JSONL of {prompt, answer, score}.
    `style:FILE`: 1 for the JSON file's chosen_pattern, less 1 for its rejected_pattern."""
    num_return_sequences: int = 8
    """Samples a prompt."""
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    """Prompt i of the rows is sampled with seed + i, whoever samples it."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer with its chat template; null: each model's own."""
    split: str = "train"
    """Split of a hub data set of rows."""
    limit: int | None = None
    """Only the first so many rows."""
    device: str = "auto"

    def __post_init__(self) -> None:
        ranges.check(self)
        check_device(self.device)
        if {self.chosen, self.rejected} == {ROW}:
            raise ValueError("chosen and rejected are both 'row': those are the rows' own pairs; name a model for one of them")
        if self.chosen == self.rejected and self.num_return_sequences < 2:
            raise ValueError("one sample a prompt has no best and no worst; expected num_return_sequences of 2 or more")


@dataclass(frozen=True)
class SeparationConfig:
    """Which behaviours, how many questions, and where the files go."""

    data_dir: str
    """File or folder of persona statements, as in anthropics/evals."""
    output_dir: str = "runs/separation"
    """Folder of separation.json and the pictures."""
    behaviours: list[str] | None = None
    """Names of behaviours; null: all that have questions of either answer."""
    limit: int = 500
    """Most questions of either class."""
    batch_size: int = 32
    device: str = "auto"

    def __post_init__(self) -> None:
        ranges.check(self)
        check_device(self.device)


@dataclass(frozen=True)
class SentimentConfig:
    """Which statements, in which style, and where the rows go."""

    data_dir: str | None = None
    """Folder with sentiment/tweet_sentiment_train.jsonl.gz, rows {text, label_text}; null: generated statements."""
    style: Literal["single token", "short suffix", "long suffix", "prefix and suffix"] = "long suffix"
    """The form of the answers."""
    output_dir: str = "runs/sentiment"
    """Folder of sft.jsonl, pairs_train.jsonl and pairs_test.jsonl."""


@dataclass(frozen=True)
class ReportOptions:
    """How uncertainty is computed; by default as the study's own config.yaml says."""

    samples: int | None = None
    """Bootstrap draws; null: the study's."""
    confidence: float | None = None
    """Level of the intervals, e.g. 0.95; null: the study's."""
    paper: Literal["magpie_pro", "magpie_air_gemma2"] | None = None
    """Show the rows of the OGD paper's Table 1 for this data set next to ours; null: as the study."""

    def __post_init__(self) -> None:
        ranges.check(self)


@dataclass(frozen=True)
class ToyConfig:
    """Where a toy study writes, and what it repeats."""

    output_dir: str | None = None
    """Folder of the study's files; null: runs/studies/NAME."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    """One repetition each; a verdict needs five."""

    def __post_init__(self) -> None:
        ranges.check(self)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}; expected different non-negative integers, five or more for a verdict")


@dataclass(frozen=True)
class ToyDataConfig(ToyConfig):
    """The same for a study that reads data of yours."""

    data_dir: str | None = None
    """dynamics: file or folder of persona statements as in anthropics/evals; entanglement: folder with
    sentiment/tweet_sentiment_train.jsonl.gz, rows {text, label_text}; null: generated data."""


@dataclass(frozen=True)
class NoOptions:
    """A command that has none."""


@dataclass(frozen=True)
class Launch:
    """How `run` is started, which no recipe holds."""

    dry_run: bool = False
    """Check data and settings and say what a run would take, instead of running: loads no weights, writes nothing."""
    world_size: int | None = None
    """Processes that a dry run estimates for; null: the launcher's."""

    def __post_init__(self) -> None:
        ranges.check(self)

    @property
    def processes(self) -> int:
        """Processes that a dry run estimates for."""
        return self.world_size or int(os.environ.get("WORLD_SIZE", "1"))
