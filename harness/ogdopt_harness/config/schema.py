"""Configuration of a study: frozen dataclasses, read from YAML and dotted overrides (`command_line.py`).

Dataclass defaults are the paper's recipe (Mistral-7B, appendix A.2 of the OGD paper); the recipes in
`harness/ogdopt_harness/recipes/` say what differs. Paths may hold `{data}`, which stands for the study's own data folder,
and `{data_dir}`, for yours.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ogdopt_harness.config import ranges

DEVICE = re.compile(r"auto|(cpu|cuda|mps|xpu)(:\d{1,3})?")
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
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
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
    newcomers: int = 0
    """Further people whom the supervised conversations leave out. Their facts are in a file of their own, to be learned
    together with the preference."""
    held_out_pairs: int = 128
    items: int = 128
    """Most test items a benchmark family holds."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021), trained instead of the weights; peft's names and meanings."""

    r: int = 8
    """Rank of what is added to a weight."""
    lora_alpha: float = 16
    """What is added is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout before the adapters in training; never in a measurement."""
    target_modules: list[str] | str = "all-linear"
    """Ends of the names of the modules that get an adapter, e.g. [q_proj, v_proj]; all-linear: all but the head."""

    def __post_init__(self) -> None:
        if not self.target_modules or not all(self.target_modules):
            raise ValueError(f"model.lora.target_modules is {self.target_modules!r}; expected at least one name, none empty")


@dataclass(frozen=True)
class ModelConfig:
    """The model: a hub id or Hugging Face folder, or one built here from an architecture."""

    model_name_or_path: str | None = "mistralai/Mistral-7B-v0.3"
    """A hub id, a Hugging Face folder, an adapter's folder (merged into its base) or a GGUF file. null: a fresh model of
    `architecture`."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the transformers configuration class named by its key `model_type` (e.g. mistral)."""
    tokenizer_name_or_path: str | None = None
    """Hub id or folder of another tokenizer with the model's vocabulary, for its chat template. null: the model's own. A fresh
    model gets one that is trained on the study's text."""
    tokenizer_type: Literal["bpe", "word"] = "bpe"
    """Kind of tokenizer that is trained for a fresh model."""
    vocab_size: int = 4096
    chat_template: str | None = None
    """Jinja text of the chat template, or a file with it, for tokenizers of base models; null: the tokenizer's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the stored weights; float32 master weights keep updates that bfloat16 would round away."""
    bf16: bool = True
    """Compute in bfloat16 under autocast on an accelerator; ignored on a CPU."""
    attn_implementation: str | None = None
    """How attention is computed: sdpa, eager, flex_attention, or, with its package, flash_attention_2; null: sdpa."""
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    """Train adapters in both stages, and leave the weights alone. Exports hold the sum of both. A fresh model trains its
    weights in the supervised stage, since it knows nothing yet. null: train the weights."""
    train_only: list[str] = field(default_factory=list)
    """Train only parameters whose dotted names hold one of these, e.g. [lm_head] (the unembedding) or [layers.31]. It holds for
    the same stages as `lora`. Empty: train all."""

    def __post_init__(self) -> None:
        if self.lora is not None and self.train_only:
            raise ValueError(f"model.lora is given, and model.train_only is {self.train_only}; expected one of them")

    @property
    def words(self) -> str | None:
        """Where the tokenizer is: as given, or the model's own; None where one is trained."""
        return self.tokenizer_name_or_path or self.model_name_or_path

    def at_stage(self, kind: str) -> ModelConfig:
        """These settings, without `lora` and `train_only` where a fresh model has its supervised stage (kind "sft")."""
        fresh = kind == "sft" and self.model_name_or_path is None
        return dataclasses.replace(self, lora=None, train_only=[]) if fresh else self


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
    """Our column name -> the name in the files, e.g. {chosen: accepted}; never guessed. `a|b` is the first that a row has. A
    mapped `input` (Alpaca) follows the prompt."""
    max_length: int = 4096
    """Longest prompt plus completion, in tokens."""
    max_prompt_length: int = 2048
    """Longest prompt, in tokens."""
    on_bad_row: Literal["error", "skip"] = "error"
    """error: stop before training and name the rows; skip: leave them out, named and counted."""
    on_long_row: Literal["drop", "truncate", "error"] = "drop"
    """drop: leave out and count rows over a limit; truncate: keep the prompt's end and the completion's start; error: stop."""
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
    lr_scheduler_type: Literal["constant_with_warmup", "linear", "cosine", "cosine_with_min_lr"] = "constant_with_warmup"
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the schedule, e.g. {min_lr_rate: 0.1} for cosine_with_min_lr."""
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
    """Most examples in one forward pass of one process; the rest of the batch is accumulated."""
    per_device_train_tokens: int | None = None
    """Most tokens in one forward pass of one process, padding included; null: as many as these examples have."""
    max_grad_norm: float | None = 10.0
    """Largest L2 norm of the (projected) gradient; null: no clipping."""
    set_aside: Literal["bfloat16", "int8", "cpu"] | None = None
    """How the rejected's gradient waits for the chosen's: as it is (null), rounded, or in the host's memory."""
    fused: bool = False
    """Projection, clipping and the optimizer's step in two compiled passes over memory; needs a compiler."""
    update_cosine_steps: int | None = None
    """Measure `ogd/update_cosine_*` every so many steps, for methods of two gradients. It copies the parameters for that step.
    null: at the steps that measure held-out pairs (`eval_steps`)."""
    loss_reduction: Literal["sum", "mean"] = "sum"
    """Negative log-likelihood of a sequence: sum or mean over its tokens; sequences are averaged in both."""
    train_on_prompt: bool = False
    """Loss on every token of the sequence instead of the completion alone."""
    seed: int = 1
    eval_steps: int | None = None
    """Measure held-out pairs every so many steps; null: ten times an epoch. Step 0 and each epoch's end are always measured."""
    save_steps: int | None = None
    """Save a checkpoint every so many steps, besides the one at each epoch's end."""
    export: Literal["all", "last"] = "all"
    """Which models are exported as Hugging Face folders: one for every epoch, or only the last."""
    logging_steps: int = 1
    max_skipped_steps: int = 20
    """A run ends, with a message, once so many steps in a row had gradients that are not finite."""

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
    """direct: choices after the question in the chat template (the paper's TAX). cloze: choices after the row's plain text
    `cloze`. generate: does the greedy reply contain the answer?"""


@dataclass(frozen=True)
class EvalConfig:
    """What is measured on every exported model."""

    tasks: list[TaskConfig] = field(default_factory=list)
    """Local benchmarks."""
    lm_eval_tasks: list[str] = field(default_factory=list)
    """Names of official lm-evaluation-harness tasks (they need the hub, its cache, or `lm_eval_data`)."""
    lm_eval_data: str | None = None
    """Folder with hub data sets as `<owner>/<name>/...`. Official tasks are then read from it instead of the hub."""
    limit: int | None = None
    """Only the first so many items of each task."""
    batch_size: int = 64
    max_new_tokens: int = 32
    epochs: Literal["all", "last"] = "all"
    """Which of a run's models are evaluated: after every epoch, or only at its end."""
    style: str | None = None
    """JSON file {chosen_pattern, rejected_pattern}: regular expressions that recognise the style of a reply."""
    style_prompts: str | None = None
    """JSONL of {prompt}: held-out prompts whose greedy replies `style` judges."""
    apply_chat_template: bool = True
    system_instruction: str | None = None
    """A system prompt. It becomes the first sentence of the user's turn, as in the paper; so do the tasks' descriptions."""
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    """auto: spread the layers over all GPUs, for models that one GPU cannot hold. It needs one process, and accelerate."""


@dataclass(frozen=True)
class SparseConfig:
    """What the method sparse learns together with the model: a significance for every token; positive: the token counts."""

    significance: Literal["hidden", "free"] = "hidden"
    """hidden: one linear layer on hidden states; free: a number for every token of the training rows."""
    learning_rate: float = 1e-3
    initial: float = 0.5
    """Significance of all tokens at the start; well above 0, all count, as in DPO."""


@dataclass(frozen=True)
class PreferenceConfig(StageConfig):
    """The preference stage; each method starts from the supervised model."""

    beta: list[float] = field(default_factory=lambda: [0.2, 0.1, 0.05, 0.02])
    """Strengths of the methods that have one (dpo); each is a run of its own."""
    warn_at: dict[str, float] = field(default_factory=dict)
    """When the 3D-properties of held-out pairs warn, in nats a token: ratio_growth, chosen_share, chosen_drop, unseen_rise.
    `ogdopt.three_d.Thresholds` has the defaults."""
    loss_args: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further hyper-parameters of losses by method, e.g. {simpo: {simpo_gamma: 0.5}}; the defaults are in `ogdopt.losses`."""
    sparse: SparseConfig = field(default_factory=SparseConfig)
    probe_steps: int | None = None
    """For methods of one gradient (dpo and other losses of pairs): log entanglement every so many steps; null: never. It needs
    the gradients of both sides, and costs as much as two steps. Methods of two gradients log it at every step, at no cost."""


@dataclass(frozen=True)
class JointConfig:
    """Preference pairs and supervised rows in one run: the methods mix, alright, maxright, sequential and their variants.

    All other settings are those of the preference stage. An epoch is one pass over the pairs' batches, however the steps are
    shared. Each stream goes through its own rows at its own pace.
    """

    data: DataConfig | None = None
    """Supervised rows of these methods; null: those of `sft.data`. The loss of `eval` rows is logged as `eval_loss`."""
    lambdas: list[float] = field(default_factory=lambda: [0.5])
    """Weights of the preference loss, from 0 to 1; the supervised loss has 1 - lambda. Each is a run of its own."""
    evaluate_every: list[int] = field(default_factory=lambda: [10])
    """For maxright: evaluate both losses every so many steps, and use the last ones in between; -1: only at step 0. Each is a
    run of its own."""
    beta: float = 0.1
    """Beta of the DPO loss. All joint methods are measured by it."""
    train_batch_size: int | None = None
    """Supervised examples in one optimizer step; null: `preference.train_batch_size`."""
    start: Literal["supervised", "base"] = "supervised"
    """The model that these methods start from: the supervised model, or the one before it. The reference of the DPO loss is the
    supervised model in both cases."""
    objective_rows: int = 256
    """How many training rows of each stream both objectives are measured on. They are the same rows every time."""
    optima: dict[str, float] | None = None
    """{preference: x, sft: y}: the least value of each objective, from which gaps are counted. null: found once a seed, by
    optimizing each one alone for `optima_epochs`."""
    optima_epochs: int | None = None
    """Epochs of the two runs that find the optima; null: `preference.num_train_epochs`."""
    stop_gap: float | None = None
    """Stop a run when an objective is this close to its optimum, or when both are that close to a point of `stop_pareto`. The
    paper uses 1e-4; null: never. Sequential runs and those that find the optima are not stopped."""
    stop_pareto: list[list[float]] | None = None
    """Pairs [preference, sft] of values that are good enough; null: the last values of this seed's finished ALRIGHT runs."""

    def __post_init__(self) -> None:
        if self.optima is not None and set(self.optima) != {"preference", "sft"}:
            raise ValueError(
                f"joint.optima is {self.optima}; expected {{preference: x, sft: y}}, the least value of each objective, or "
                "null to have them found"
            )
        if self.stop_pareto is not None and any(len(point) != 2 for point in self.stop_pareto):
            raise ValueError(f"joint.stop_pareto is {self.stop_pareto}; expected a list of pairs [preference, sft], or null")


@dataclass(frozen=True)
class ReportConfig:
    """How uncertainty is computed."""

    samples: int = 10_000
    """Bootstrap draws."""
    confidence: float = 0.95
    paper: Literal["magpie_pro", "magpie_air_gemma2"] | None = None
    """Show the rows of the OGD paper's Table 1 for this data set next to ours."""


@dataclass(frozen=True)
class Config:
    """A study: one supervised stage, methods that start from it, evaluation and report."""

    study: StudyConfig = field(default_factory=StudyConfig)
    methods: list[str] = field(default_factory=lambda: ["sft", "dpo", "ogd"])
    """Preference methods: sft (only the chosen responses), dpo, ogd, ogd_metric (OGD in the optimizer's own metric).
    On pairs and supervised rows together: mix, alright, maxright, sequential (preference first), sequential_sft_first.
    The same with OGD on the pairs: mix_ogd, alright_ogd, maxright_ogd.
    Other losses of pairs: r_dpo, dpop, ipo, sppo, simpo, cpo, slic_hf, cdpo, robust_dpo, flex_dpo, sft_dpo, rrhf, orpo, sparse.
    A loss of pairs or of unpaired rows: kto.
    Normalized preference optimization of a batch, or of each pair: npo, npo_pair.
    A reward model, measured on held-out pairs alone: reward_model."""
    world: WorldConfig | None = None
    """Make a miniature world and put its files in `{data}`; null: use your own data."""
    model: ModelConfig = field(default_factory=ModelConfig)
    sft: StageConfig = field(default_factory=sft_defaults)
    """The supervised stage; without training data the methods start from the model itself."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    joint: JointConfig = field(default_factory=JointConfig)
    evals: EvalConfig = field(default_factory=EvalConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    data_dir: str | None = None
    """Folder that replaces `{data_dir}` in paths. A recipe can then name files without knowing where they are."""
    report_to: list[str] = field(default_factory=lambda: ["auto"])
    """Experiment trackers that metrics are logged to: tensorboard, wandb, trackio, ... (accelerate's names). auto: tensorboard
    where it is installed. none: no tracker."""
    device: str = "auto"
    """auto: cuda if there is one, else cpu."""
    threads: int | None = None
    """CPU threads of torch; null: one a core."""

    def __post_init__(self) -> None:
        ranges.check(self)
        check_device(self.device)
        if self.evals.epochs == "all" and self.preference.export == "last":
            raise ValueError(
                "evals.epochs is all, but preference.export is last, so that earlier epochs have no model; expected the same"
            )
        size, micro = self.joint.train_batch_size, self.preference.per_device_train_batch_size
        if size is not None and size % micro:
            raise ValueError(
                f"joint.train_batch_size is {size}; expected a multiple of preference.per_device_train_batch_size ({micro}), "
                "or null for preference.train_batch_size"
            )


def check_device(name: str) -> None:
    """Raises ValueError unless it is the name of a kind of device."""
    if not DEVICE.fullmatch(name):
        raise ValueError(f"device is {name!r}; expected auto, cpu, cuda or cuda:<number> (mps, xpu)")


def as_dict(config: Any) -> Any:
    """A configuration, or a dictionary of such, as plain dictionaries for config.yaml."""
    if isinstance(config, dict):
        return {key: as_dict(value) for key, value in config.items()}
    return dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else config
