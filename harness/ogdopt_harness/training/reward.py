"""Reward models: the start of all methods with a head of one number, trained on the same pairs by the Bradley-Terry loss.

They are run like a method, but nobody asks them questions: what is followed is how many held-out pairs they order rightly, to
compare with the implicit rewards of the other methods ("3D-properties", figure 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from ogdopt.losses import Completion
from ogdopt_harness.common import keys
from ogdopt_harness.config.schema import ModelConfig
from ogdopt_harness.data.examples import Example, collate
from ogdopt_harness.modeling.build import attention_of
from ogdopt_harness.modeling.pretrained import load_pretrained
from ogdopt_harness.training.progress import Signals, Speed
from ogdopt_harness.training.scoring import Scorer, rewards_of, sums_of
from ogdopt_harness.training.step_record import StepRecord
from ogdopt_harness.training.trainer import Trainer


def load_reward_model(config: ModelConfig, name_or_path: str | Path, pad_token_id: int, seed: int) -> Any:
    """The model with a fresh head, drawn from `seed`. Raises ValueError if there is none, and for adapters."""
    if config.lora is not None or config.train_only:
        raise ValueError("reward_model trains all weights, since its head is new; leave model.lora and model.train_only out")
    torch.manual_seed(seed)
    options = {"num_labels": 1, "dtype": getattr(torch, config.dtype), **attention_of(config)}
    model = load_pretrained(AutoModelForSequenceClassification, name_or_path, "reward_model", **options)
    model.config.pad_token_id = pad_token_id
    return model


class RewardScorer(Scorer):
    """Scores by a reward model as `Scorer` does by a policy: the reward of a sequence stands at its last token."""

    kind = AutoModelForSequenceClassification

    def score(
        self, examples: Sequence[Example], on_prompt: bool | None = None, states: list[torch.Tensor] | None = None
    ) -> Completion:
        """Rewards as completions, (B, T - 1): the reward at the last scored token and 0 at the others, adding up to it."""
        batch = collate(examples, self.tokenizer.pad_token_id, False).to(self.device)
        scored = batch.loss_mask[:, 1:]
        with self.autocast:  # its own forward pass, so that whoever loads the exported model gets the same rewards
            rewards = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0].float()
        ends = batch.attention_mask.long().sum(1) - 1
        places = torch.zeros(scored.shape, device=rewards.device).scatter(1, ends[:, None] - 1, rewards[:, None])
        return Completion(places, scored)

    def _reference_logps(self) -> dict[str, torch.Tensor]:
        return {}

    def measure(self) -> dict[str, float]:
        held_out = self.job.held_out
        if held_out is None or not held_out.paired:
            return {}
        a, b = (sums_of(self.scores(side))[0] for side in (held_out.winners, held_out.losers))
        line = {keys.measured(name): value.item() for name, value in rewards_of(a, b, 1.0).items()}
        return line | {keys.EVAL_LOSS: -torch.nn.functional.logsigmoid(a - b).mean().item()}


class RewardTrainer(Trainer):
    """Trains a reward model as `Trainer` trains a policy, and logs rewards instead of log-probabilities."""

    scorer_type = RewardScorer

    def line(self, record: StepRecord, signals: Signals, speed: Speed) -> tuple[dict[str, float], int]:
        line, stop = super().line(record, signals, speed)
        line |= {keys.reward(side): line.pop(keys.logps(side)) for side in keys.SIDES}
        return line | {keys.MARGINS: line[keys.reward(keys.CHOSEN)] - line[keys.reward(keys.REJECTED)]}, stop
