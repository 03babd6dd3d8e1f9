"""What a training run is to do: its rows, settings and place; and which rows make up which step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ogdopt_harness.common.keys import PREFERENCE, SFT
from ogdopt_harness.config.schema import PreferenceConfig, StageConfig
from ogdopt_harness.data.examples import Example, Preferences, order
from ogdopt_harness.training.joint import Joint
from ogdopt_harness.training.methods import METHODS


@dataclass
class Job:
    """One training run: what to train, on what, how, and where its files go."""

    directory: Path
    label: str
    method: str
    config: StageConfig
    data: Preferences
    held_out: Preferences | None
    """Pairs whose log-probabilities are followed; None: none."""
    beta: float | None = None
    """The one of `preference.beta`, or that of a joint run."""
    base: str = ""
    """What the model starts from, for the model card."""
    recipe: dict[str, Any] = field(default_factory=dict)
    validation: Sequence[Example] = ()
    """Held-out supervised examples whose loss is measured."""
    joint: Joint | None = None
    """The supervised stream of a method with a schedule."""
    report_to: Sequence[str] = ()
    """Names of experiment trackers (`ogdopt_harness.training.trackers`)."""
    project: str = ""
    """The study's name, for trackers."""

    def __post_init__(self) -> None:
        if METHODS[self.method].schedule and not (self.joint and self.joint.supervised):
            raise ValueError(
                f"method {self.method!r} trains on supervised rows together with the pairs, and there are none; give "
                "sft.data.train, or choose sft, dpo, ogd or ogd_metric"
            )
        if METHODS[self.method].pairwise and not self.data.paired:
            raise ValueError(
                f"method {self.method!r} compares two answers to one prompt, but the preference rows are unpaired (prompt, "
                "completion, label); give pairs (prompt, chosen, rejected), or choose sft, ogd, ogd_metric or kto"
            )
        if METHODS[self.method].loss == "kto" and not (self.data.winners and self.data.losers):
            raise ValueError(
                f"method {self.method!r} needs preferred and rejected completions, and there are {len(self.data.winners)} and "
                f"{len(self.data.losers)}; give rows of both labels"
            )

    @property
    def seed(self) -> int:
        """What the order of rows and the generators begin with."""
        return self.config.seed

    @property
    def preference(self) -> PreferenceConfig:
        """The settings that methods of preference tuning read; the defaults in the supervised stage."""
        return self.config if isinstance(self.config, PreferenceConfig) else PreferenceConfig()

    @property
    def loss_args(self) -> dict[str, Any]:
        """Hyper-parameters of the method's loss other than beta."""
        return self.preference.loss_args.get(self.method, {})

    @property
    def plan(self) -> Plan:
        """Which rows make up which step."""
        losers = self.data.losers if "loser" in METHODS[self.method].sides else []
        return Plan(len(self.data.winners), len(losers), self.data.paired, self.config, self.seed)

    @property
    def streams(self) -> dict[str, Plan]:
        """Which rows make up which step of each stream of a joint run; none for other methods."""
        if self.joint is None:
            return {}
        config = dataclasses.replace(self.config, train_batch_size=self.joint.batch_size)
        return {PREFERENCE: self.plan, SFT: Plan(len(self.joint.supervised), 0, False, config, self.seed)}


@dataclass(frozen=True)
class Plan:
    """The rows of every step, as a pure function of the step's number: a resumed run has nothing else to remember."""

    winners: int
    losers: int
    paired: bool
    config: StageConfig
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch; unpaired sides of different size: the larger one's, and the smaller starts over."""
        return math.ceil(max(self.winners, self.losers) / self.config.train_batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        total = self.steps_per_epoch * self.config.num_train_epochs
        return min(total, self.config.max_steps) if self.config.max_steps > 0 else total

    def rows(self, step: int) -> tuple[list[int], list[int]]:
        """Indices of the chosen and of the rejected of a step (0, 1, ...)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        winners = self._slice(self.winners, epoch, position, 0)
        if self.paired:
            return winners, winners
        return winners, self._slice(self.losers, epoch, position, 1) if self.losers else []

    def _slice(self, n: int, epoch: int, position: int, side: int) -> list[int]:
        size = self.config.train_batch_size
        lap, position = divmod(position, math.ceil(n / size))
        seed = self.seed if not side else self.seed + 1_000_003  # unpaired rejected are shuffled on their own
        return order(n, seed, epoch + 100_000 * lap)[position * size : (position + 1) * size]
