"""The names under which training logs: TRL's where it has one. Writers and readers take them from here.

A line of `metrics.jsonl` maps such names to numbers. What is measured on held-out rows has the prefix `eval_`. Some names are
the library's own (`ogdopt.diagnostics`, `ogdopt.three_d`, step reports). They are repeated here for readers, who need no torch;
a test compares them with what runs log.
"""

from __future__ import annotations

CHOSEN, REJECTED = "chosen", "rejected"
SIDES: tuple[str, str] = (CHOSEN, REJECTED)
PREFERENCE, SFT = "preference", "sft"
STREAMS: tuple[str, str] = (PREFERENCE, SFT)
"""The two objectives of a joint run, in the order of their steps."""

# ---- every line -----------------------------------------------------------------------------------------------------------

STEP, EPOCH = "step", "epoch"
LOSS = "loss"
LEARNING_RATE = "learning_rate"
GRAD_NORM = "grad_norm"
SPEED = "tokens_per_second"
PADDING = "padding"
"""Share of the positions in a batch that hold no token."""
GPU = "gpu_utilization"
SKIPPED = "skipped"
"""1 where a step was left out because a gradient was not finite."""

# ---- answers of a batch; measured(...) of held-out ones -------------------------------------------------------------------

MARGINS, ACCURACIES = "rewards/margins", "rewards/accuracies"
KL = "kl"
WEIGHT = "npo/weight"
EVAL = "eval_"


def logps(side: str) -> str:
    """Log-probability of a side's answers, nats an answer."""
    return f"logps/{side}"


def logps_mean(side: str) -> str:
    """The same, nats a token."""
    return f"logps_mean/{side}"


def reward(side: str) -> str:
    """beta times the change of a side's log-probability since the start."""
    return f"rewards/{side}"


def measured(name: str) -> str:
    """A figure of held-out rows."""
    return EVAL + name


EVAL_LOSS, EVAL_DPO_LOSS = measured(LOSS), measured("dpo_loss")
UNSEEN = measured("unseen_mass")
"""Probability of answers unlike both of a pair."""

# ---- joint runs -----------------------------------------------------------------------------------------------------------

PREFERENCE_STEP = "objective/chosen"
"""1 where the step was the preference's."""


def objective(stream: str) -> str:
    """A stream's loss; `measured` of it is that on the rows that are followed all along."""
    return f"objective/{stream}"


def gap(stream: str) -> str:
    """A stream's loss above its optimum, as a schedule knows it."""
    return f"objective/gap_{stream}"


def epochs_of(stream: str) -> str:
    """Epochs of its own that a stream has had."""
    return f"epoch/{stream}"


# ---- two gradients --------------------------------------------------------------------------------------------------------

COSINE, PROJECTED, PASSES = "ogd/cosine", "ogd/projected_fraction", "ogd/passes"
COEFFICIENT, PARALLEL = "ogd/coefficient", "ogd/parallel"
ENTANGLED, CASE = "entanglement/cosine", "entanglement/case"
CONDITION = "entanglement/condition"
LAYER = "entanglement/layer/"
"""What a layer's name follows: the cosine of the two gradients there."""


def norm(side: str) -> str:
    """Length of a side's gradient."""
    return f"ogd/norm_{side}"


def update_cosine(side: str) -> str:
    """Cosine of the parameter change with a side's gradient."""
    return f"ogd/update_cosine_{side}"


def weight(side: str) -> str:
    """The mean weight that a loss gives to a side's gradient."""
    return f"entanglement/weight_{side}"


# ---- significance of tokens (sparse), drop and dispersion (three_d) -------------------------------------------------------


def tokens_on(side: str) -> str:
    """Share of a side's tokens whose significance is above 0."""
    return f"sparse/on_{side}"


def significance(side: str) -> str:
    """Mean size of the significance of a side's tokens."""
    return f"sparse/w_{side}"


GRADIENT_RATIO, CHOSEN_SHARE, CHOSEN_DROP = "3d/log_gradient_ratio", "3d/chosen_share", "3d/chosen_drop"
UNSEEN_MASS, UNSEEN_CHANGE = "3d/unseen", "3d/unseen_change"

# ---- complete.json --------------------------------------------------------------------------------------------------------

STEPS, EPOCHS, SECONDS = "steps", "epochs", "seconds"
SKIPPED_STEPS, WARNINGS, STOPPED = "skipped_steps", "warnings", "stopped"
STEP_SECONDS, STEP_CPU_SECONDS, PEAK_MEMORY = "step_seconds", "step_cpu_seconds", "peak_memory"
