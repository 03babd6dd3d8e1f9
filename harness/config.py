"""Configuration of a study: frozen dataclasses, read from YAML and dotted overrides by jsonargparse.

Dataclass defaults are the paper's recipe (Mistral-7B, appendix A.2 of the OGD paper); the recipes in
`harness/recipes/` say what differs. Paths may hold `{data}`, which stands for the study's own data folder, and
`{data_dir}`, for yours.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jsonargparse

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = RECIPES / "miniature.yaml"
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class StudyConfig:
    """Where a study lives and what it repeats."""

    name: str = "study"
    """Name of the study: letters, digits, '.', '_' and '-'."""
    output_dir: str | None = None
    """Directory of the study; default `runs/<name>`."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """One whole study a seed: seed k trains with `sft.seed + k` and `preference.seed + k`, and makes world `world.seed + k`."""

    def __post_init__(self) -> None:
        if not RUN_NAME.fullmatch(self.name):
            raise ValueError(
                f"study.name is {self.name!r}; expected 1-128 letters, digits, '.', '_' or '-', starting with a letter or digit"
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"study.seeds is {self.seeds}; expected one or more different non-negative integers, e.g. 0,1,2")

    @property
    def directory(self) -> Path:
        return Path(self.output_dir) if self.output_dir else Path("runs") / self.name


@dataclass(frozen=True)
class WorldConfig:
    """The miniature world: which facts, texts, pairs and benchmarks the generator writes into `{data}`."""

    seed: int = 0
    people: int = 48
    """Number of invented people; each has one value for each attribute."""
    sft_conversations: int = 20_000
    preference_pairs: int = 1024
    held_out_pairs: int = 128
    items: int = 128
    """Most test items a benchmark family holds."""


@dataclass(frozen=True)
class ModelConfig:
    """The model: a hub id or Hugging Face folder, or one built here from an architecture."""

    model_name_or_path: str | None = "mistralai/Mistral-7B-v0.3"
    """Hub id or folder of the model to start from; null builds a fresh one from `architecture`."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the transformers configuration class named by its key `model_type` (e.g. mistral)."""
    tokenizer_name_or_path: str | None = "mistralai/Mistral-7B-Instruct-v0.3"
    """Hub id or folder of the tokenizer with its chat template; null trains one on the study's own text."""
    tokenizer_type: Literal["bpe", "word"] = "bpe"
    """Kind of tokenizer that is trained when `tokenizer_name_or_path` is null."""
    vocab_size: int = 4096
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the stored weights; float32 master weights keep updates that bfloat16 would round away."""
    bf16: bool = True
    """Compute in bfloat16 under autocast on an accelerator; ignored on a CPU."""
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class DataConfig:
    """One data set: where its rows are, what its columns are called, what happens to unusable rows."""

    train: list[str] = field(default_factory=list)
    """Training rows: JSONL files (also .gz), .json, .parquet, folders of these, or hub ids `owner/name[:configuration]`."""
    eval: list[str] = field(default_factory=list)
    """The same for held-out rows; empty: no held-out measurements."""
    train_split: str = "train"
    eval_split: str = "test"
    """Splits that are read from hub data sets."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column name -> the name in the files, e.g. {chosen: accepted}; never guessed. `a|b` takes the first that a row has;
    a mapped `input` (Alpaca) is put below the prompt."""
    max_length: int = 4096
    """Longest prompt plus completion, in tokens."""
    max_prompt_length: int = 2048
    """Longest prompt, in tokens."""
    on_bad_row: Literal["error", "skip"] = "error"
    """error: stop before training and name the rows; skip: leave them out, named and counted."""
    on_long_row: Literal["drop", "truncate", "error"] = "drop"
    """drop: leave rows over a limit out, counted; truncate: keep the end of the prompt and the start of the completion."""
    max_train_rows: int | None = None
    max_eval_rows: int | None = None


@dataclass(frozen=True)
class StageConfig:
    """How one model is trained. The batch is the *effective* one, of one optimizer step; accumulation is derived."""

    data: DataConfig = field(default_factory=DataConfig)
    optimizer: Literal["RMSprop", "Adam", "AdamW", "SGD"] = "RMSprop"
    optimizer_args: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the torch.optim class."""
    learning_rate: float = 1e-6
    lr_scheduler_type: Literal["constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    warmup_steps: int = 150
    """Steps of linear warm-up; used when `warmup_ratio` is null."""
    warmup_ratio: float | None = None
    """Share of all steps that warm up linearly."""
    num_train_epochs: int = 5
    max_steps: int = -1
    """Stop after this many optimizer steps; -1: all epochs."""
    train_batch_size: int = 64
    """Effective batch: examples (pairs) in one optimizer step."""
    per_device_train_batch_size: int = 64
    """Examples in one forward pass; the rest of the batch is accumulated."""
    max_grad_norm: float | None = 10.0
    """Largest L2 norm of the (projected) gradient; null: no clipping."""
    loss_reduction: Literal["sum", "mean"] = "sum"
    """Negative log-likelihood of a sequence: sum or mean over its tokens; sequences are averaged in both."""
    train_on_prompt: bool = False
    """Loss on every token of the sequence instead of the completion alone."""
    seed: int = 1
    eval_steps: int | None = None
    """Measure held-out pairs every so many steps; null: ten times an epoch. Step 0 and every epoch's end always."""
    save_steps: int | None = None
    """Also save a checkpoint every so many steps; every epoch's end always."""
    logging_steps: int = 1

    def __post_init__(self) -> None:
        if self.train_batch_size % self.per_device_train_batch_size:
            raise ValueError(
                f"train_batch_size is {self.train_batch_size}; expected a multiple of per_device_train_batch_size "
                f"({self.per_device_train_batch_size})"
            )

    @property
    def gradient_accumulation_steps(self) -> int:
        return self.train_batch_size // self.per_device_train_batch_size

    def warmup(self, steps: int) -> int:
        """Steps of warm-up in a run of so many steps."""
        return self.warmup_steps if self.warmup_ratio is None else round(self.warmup_ratio * steps)


def sft_defaults() -> StageConfig:
    """The paper's supervised stage (appendix A.2)."""
    return StageConfig(
        optimizer="Adam",
        learning_rate=5e-6,
        warmup_ratio=0.1,
        num_train_epochs=1,
        train_batch_size=256,
        per_device_train_batch_size=64,
        train_on_prompt=True,
        seed=0,
    )


@dataclass(frozen=True)
class TaskConfig:
    """One local benchmark: a JSONL file of questions, and the ways in which they are asked."""

    name: str
    path: str
    """JSONL of {question, choices, answer[, id, context, cloze]}, `answer` an index into `choices`; or of preference pairs
    {prompt, chosen, rejected}."""
    family: str = ""
    """What the benchmark measures, e.g. commonsense, knowledge, math, reading; only shown in tables."""
    ask: list[Literal["direct", "cloze", "generate"]] = field(default_factory=lambda: ["direct"])
    """direct: choices after the chat-templated question (the paper's TAX); cloze: choices after the row's plain text
    `cloze`; generate: does the greedy reply contain the answer?"""


@dataclass(frozen=True)
class EvalConfig:
    """What is measured on every exported model."""

    tasks: list[TaskConfig] = field(default_factory=list)
    """Local benchmarks."""
    lm_eval_tasks: list[str] = field(default_factory=list)
    """Names of official lm-evaluation-harness tasks (they need the hub, its cache, or `lm_eval_data`)."""
    lm_eval_data: str | None = None
    """Folder of hub data sets, `<owner>/<name>/...` laid out as on the hub, that official tasks are read from instead."""
    limit: int | None = None
    """Only the first so many items of each task."""
    batch_size: int = 64
    max_new_tokens: int = 32
    style: str | None = None
    """JSON file {chosen_pattern, rejected_pattern}: regular expressions that tell the preferred style of a reply."""
    style_prompts: str | None = None
    """JSONL of {prompt}: held-out prompts whose greedy replies `style` judges."""
    apply_chat_template: bool = True


@dataclass(frozen=True)
class PreferenceConfig(StageConfig):
    """The preference stage; each method starts from the supervised model."""

    beta: list[float] = field(default_factory=lambda: [0.2, 0.1, 0.05, 0.02])
    """Strengths of the methods that have one (dpo); each is a run of its own."""
    lambdas: list[float] = field(default_factory=lambda: [0.5])
    """Weights of the preference loss, from 0 to 1, in the methods that also train on the supervised rows (mix, alright,
    maxright, sequential), where the supervised loss has 1 - lambda; each is a run of its own. The supervised rows are those of
    `sft.data.train`; their loss follows this stage's `loss_reduction` and `train_on_prompt`."""
    joint_beta: float = 0.1
    """Beta of the DPO loss in these methods."""
    optima: dict[str, float] | None = None
    """For maxright: {preference: x, sft: y}, the least loss that each can reach; null: 0. Losses are as trained on: with
    `loss_reduction: sum`, sft is the whole negative log-likelihood of an answer, many times a DPO loss."""
    evaluate_every: int = 10
    """For maxright: evaluate both losses every so many steps, and go by the last known ones in between; -1: at step 0 alone."""
    sft_batch_size: int | None = None
    """Supervised examples in one optimizer step of these methods; null: `train_batch_size`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.joint_beta > 0:
            raise ValueError(f"preference.joint_beta is {self.joint_beta}; expected a positive number")
        if self.optima is not None and set(self.optima) != {"preference", "sft"}:
            raise ValueError(
                f"preference.optima is {self.optima}; expected {{preference: x, sft: y}}, the least loss that each can reach, "
                "or null for 0"
            )
        if self.evaluate_every < 1 and self.evaluate_every != -1:
            raise ValueError(f"preference.evaluate_every is {self.evaluate_every}; expected 1 or more steps, or -1")
        size = self.sft_batch_size
        if size is not None and (size < 1 or size % self.per_device_train_batch_size):
            raise ValueError(
                f"preference.sft_batch_size is {size}; expected a multiple of per_device_train_batch_size "
                f"({self.per_device_train_batch_size}), or null for train_batch_size"
            )


JOINT_OPTIONS = ("lambdas", "joint_beta", "optima", "evaluate_every", "sft_batch_size")
"""Options of the preference stage that only methods with a schedule read."""


@dataclass(frozen=True)
class ReportConfig:
    """How uncertainty is computed."""

    samples: int = 10_000
    """Bootstrap draws."""
    confidence: float = 0.95


@dataclass(frozen=True)
class Config:
    """A study: one supervised stage, methods that start from it, evaluation and report."""

    study: StudyConfig = field(default_factory=StudyConfig)
    methods: list[str] = field(default_factory=lambda: ["sft", "dpo", "ogd"])
    """Preference methods: sft (winners only), dpo, ogd, ogd_metric (OGD in the optimizer's own metric); on pairs and supervised
    rows together: mix, alright, maxright, sequential; other losses of pairs: r_dpo, dpop, ipo, sppo, simpo, cpo, slic_hf."""
    world: WorldConfig | None = None
    """Make a miniature world and put its files in `{data}`; null: the data paths are yours."""
    model: ModelConfig = field(default_factory=ModelConfig)
    sft: StageConfig = field(default_factory=sft_defaults)
    """The supervised stage; without training data the methods start from the model itself."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    evals: EvalConfig = field(default_factory=EvalConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    data_dir: str | None = None
    """Folder that `{data_dir}` in paths stands for, so that a recipe can name files without knowing where they are."""
    device: str = "auto"
    """auto: cuda if there is one, else cpu."""
    threads: int | None = None
    """CPU threads of torch; null: one a core."""


LISTS = {"--methods", "--study.seeds", "--preference.beta", "--preference.lambdas", "--evals.lm_eval_tasks"} | {
    f"--{stage}.data.{part}" for stage in ("sft", "preference") for part in ("train", "eval")
}
"""Options that also take plain commas: --methods ogd,dpo."""


@dataclass(frozen=True)
class Command:
    """What a command line asks for."""

    config: Config
    dry_run: bool
    """Check data and settings and say what a run would take, instead of running."""
    world_size: int
    """Processes that a dry run reckons with."""


def parse(argv: Sequence[str] | None = None) -> Config:
    """The configuration from a recipe and overrides: `[--config FILE] [--section.option value] ...`; see --help."""
    return command(argv).config


def command(argv: Sequence[str] | None = None) -> Command:
    """The command line: the configuration, and whether it is to be run or only checked.

    Without --config it is the miniature study. Wrong options end the process with a message, as argparse does.
    """
    # Read first and apart: these are no settings of a study, so that no recipe and no --print_config holds them.
    first = argparse.ArgumentParser(prog="run.py", add_help=False, allow_abbrev=False)
    first.add_argument("--dry_run", "--dry-run", action="store_true")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    first.add_argument("--world_size", "--world-size", type=int, default=world_size, metavar="N")
    asked, given = first.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    if asked.world_size < 1:
        first.error(f"--world_size is {asked.world_size}; expected 1 or more processes")
    if not any(word == "--config" or word.startswith("--config=") for word in given):
        given = ["--config", str(DEFAULT_RECIPE), *given]
    parser = jsonargparse.ArgumentParser(
        prog="run.py",
        description="A study: one supervised stage, preference methods that start from it, what each forgot, and a report.",
        epilog="--dry_run loads no weights and writes nothing: it checks data and settings, shows examples with the loss "
        "positions marked, lengths, steps, schedule, memory by part, and what would be written where. --world_size N: the "
        "number of processes it reckons with (default: the launcher's).",
    )
    parser.add_argument("--config", action="config", help="YAML recipe; options behind it override it")
    parser.add_class_arguments(Config)
    found = parser.instantiate(parser.parse_args(_bracketed(given)))
    config = Config(**{f.name: found[f.name] for f in dataclasses.fields(Config)})
    return Command(config, asked.dry_run, asked.world_size)


def _bracketed(words: Sequence[str]) -> list[str]:
    """Turn `--methods ogd,dpo` and `--methods=ogd,dpo` into the YAML list that the parser reads."""
    out: list[str] = []
    for word in words:
        name, sign, value = word.partition("=")
        if name in LISTS and sign:
            out.append(f"{name}={_listed(value)}")
        else:
            out.append(_listed(word) if out and out[-1] in LISTS else word)
    return out


def _listed(value: str) -> str:
    return value if value.startswith("[") or value.startswith("--") else f"[{value}]"


def as_dict(config: Any) -> Any:
    """A configuration, or a dictionary of such, as plain dictionaries for config.yaml."""
    if isinstance(config, dict):
        return {key: as_dict(value) for key, value in config.items()}
    return dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else config
