"""The 3D-properties of a run: drastic drop of the rejected answers' likelihood, degradation into unlearning, dispersion.

After "3D-properties" (Yan et al. 2024), whose measures are of probabilities. The loss of DPO pulls log-likelihoods up and down
alike. So its gradient with respect to the *probabilities* is 1/pi+ and 1/pi- of the same number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

NAMES = ("eval_logps_mean", "eval_logps", "logps")
"""What a log may call the log-likelihoods, the best first."""


@dataclass(frozen=True)
class Thresholds:
    """Where `ThreeD` warns. The likelihoods are those it is given: nats a token for answers of several tokens."""

    ratio_growth: float = 10.0
    """Growth of the gradient ratio since the start, while the rejected fall faster than the chosen rise."""
    chosen_share: float = 0.05
    """Least share of the update that acts on the chosen."""
    chosen_drop: float = 0.1
    """Fall of the chosen below their peak, in nats, while the rejected fall too."""
    unseen_rise: float = 0.1
    """Growth of the probability of unseen answers since its least value, while chosen and rejected fall."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"threshold {name} is {value}; expected a positive number")


class ThreeD:
    """The 3D-properties of a run, from the log-likelihoods of the same pairs at one step after another.

    `warnings` maps what was found (`drop`, `unlearning`, `degradation`, `dispersion`) to one sentence, of the first step that
    crossed its threshold. Rates are taken over the last `window` observations. What depends on no random number and no model
    can be computed again from the log of a run: see `replay`.

    >>> watch = ThreeD()
    >>> _ = watch.observe(0, chosen=-1.0, rejected=-1.0)
    >>> found = watch.observe(10, chosen=-1.2, rejected=-5.0, unseen=0.9)
    >>> round(found["3d/log_gradient_ratio"], 6), list(watch.warnings)
    (3.8, ['drop', 'unlearning', 'degradation'])
    """

    def __init__(self, thresholds: Thresholds | None = None, window: int = 5) -> None:
        if window < 1:
            raise ValueError(f"window is {window}; expected the number of observations that rates are taken over, 1 or more")
        self.thresholds: Thresholds = thresholds or Thresholds()
        self.window = window
        self.warnings: dict[str, str] = {}
        self._seen: list[tuple[float, float, float]] = []  # (step, chosen, rejected)
        self._ratio: float | None = None  # the first one
        self._peak = self._least = (0.0, 0.0)  # (step, value) of the likeliest chosen, and of the least unseen mass
        self._has_unseen = False

    def observe(
        self,
        step: float,
        chosen: float,
        rejected: float,
        unseen: float | None = None,
        weights: tuple[float, float] = (1.0, 1.0),
    ) -> dict[str, float]:
        """Take in log-likelihoods, nats, and the probability of unseen answers; returns the measures that are defined.

        `weights` are (d_w, d_l) of `diagnostics.weights`, equal for DPO. Of the gradient with respect to the two probabilities,
        d_w/pi+ acts on the chosen and d_l/pi- on the rejected one.

        - `3d/log_gradient_ratio`: the logarithm of the second over the first (3D, corollary 1).
        - `3d/chosen_share`: the first over their sum.
        - `3d/rate_chosen`, `3d/rate_rejected`: in nats a step. `3d/rate_ratio`: the second over the first.
        - `3d/chosen_drop`: the distance below the peak, in nats.
        - `3d/unseen`: the probability of unseen answers. `3d/unseen_change`: its change since its least value.
        """
        self._seen = [*self._seen[-self.window :], (step, chosen, rejected)]
        found: dict[str, float] = {}
        before = self._seen[0]
        if step > before[0]:
            up, down = ((now - then) / (step - before[0]) for now, then in ((chosen, before[1]), (rejected, before[2])))
            found |= {"3d/rate_chosen": up, "3d/rate_rejected": down}
            if up != 0:
                found["3d/rate_ratio"] = down / up
        d_w, d_l = (abs(d) for d in weights)
        if d_w > 0 and d_l > 0:
            found["3d/log_gradient_ratio"] = ratio = chosen - rejected + math.log(d_l / d_w)
            self._ratio = ratio if self._ratio is None else self._ratio
            found["3d/chosen_share"] = 1 / (1 + math.exp(min(ratio, 700.0)))
        elif d_w or d_l:
            found["3d/chosen_share"] = float(d_w > 0)
        if len(self._seen) == 1 or chosen > self._peak[1]:
            self._peak = step, chosen
        found["3d/chosen_drop"] = self._peak[1] - chosen
        if unseen is not None:
            if not self._has_unseen or unseen < self._least[1]:
                self._least, self._has_unseen = (step, unseen), True
            found |= {"3d/unseen": unseen, "3d/unseen_change": unseen - self._least[1]}
        self._warn(step, found)
        return found

    def read(self, row: Mapping[str, float], name: str = "eval_logps_mean") -> dict[str, float]:
        """`observe` of one line of a log, by TRL's names; {} for a line without them."""
        if f"{name}/chosen" not in row or f"{name}/rejected" not in row:
            return {}
        return self.observe(row["step"], row[f"{name}/chosen"], row[f"{name}/rejected"], row.get("eval_unseen_mass"))

    def _warn(self, step: float, found: Mapping[str, float]) -> None:
        at, up, down = self.thresholds, found.get("3d/rate_chosen", 0.0), found.get("3d/rate_rejected", 0.0)
        ratio = found.get("3d/log_gradient_ratio")
        growth = 0.0 if ratio is None or self._ratio is None else ratio - self._ratio
        share, drop, rise = found.get("3d/chosen_share", 1.0), found["3d/chosen_drop"], found.get("3d/unseen_change", 0.0)
        if growth > math.log(at.ratio_growth) and down < 0 and -down > up:
            fold = f"{math.exp(growth):.3g}" if growth < 700 else f"e^{growth:.0f}"
            self.warnings.setdefault(
                "drop",
                f"step {step:g}: drastic drop of the rejected. They change by {down:.2g} nats a step, the chosen by {up:+.2g}; "
                f"the ratio of their gradients has grown {fold}-fold: the loss mostly pushes rejected answers down",
            )
        if share < at.chosen_share:
            self.warnings.setdefault(
                "unlearning",
                f"step {step:g}: {100 * share:.2g}% of the update acts on the chosen. The rest unlearns the rejected; a "
                "smaller weight for them (flex_dpo), a likelihood term (sft_dpo) or ogd keeps learning the chosen",
            )
        if drop > at.chosen_drop and down < 0 and up < 0:
            self.warnings.setdefault(
                "degradation",
                f"step {step:g}: the chosen are {drop:.2g} nats below their peak at step {self._peak[0]:g}, and the rejected "
                "fall too. What is learned from here on is not the chosen answers; stop at the peak or lower the learning rate",
            )
        if rise > at.unseen_rise and down < 0 and up < 0:
            self.warnings.setdefault(
                "dispersion",
                f"step {step:g}: the probability of answers that are neither chosen nor rejected has grown by {rise:.2g} since "
                f"step {self._least[0]:g}, while both of these fall: probability leaves for answers that nobody asked for",
            )


def replay(
    rows: Iterable[Mapping[str, float]], thresholds: Thresholds | None = None, window: int = 5
) -> tuple[list[dict[str, float]], ThreeD]:
    """The 3D-properties of a run from the lines of its metrics.jsonl: (the measures by step, the watch with its warnings).

    Reads `step`, `eval_logps_mean/chosen`, `eval_logps_mean/rejected` and, where it is logged, `eval_unseen_mass`. A log
    without means over tokens is read by `eval_logps/...`. One without held-out pairs is read by `logps/...`, whose batches
    differ from step to step. Raises ValueError for a log with none of them.
    """
    rows, watch = list(rows), ThreeD(thresholds, window)
    for name in NAMES:
        found = [{"step": row["step"]} | measures for row in rows if (measures := watch.read(row, name))]
        if found:
            return found, watch
    raise ValueError(
        f"none of the {len(rows)} rows has log-likelihoods of chosen and rejected answers; expected eval_logps_mean/chosen and "
        "eval_logps_mean/rejected, or eval_logps/... or logps/..., TRL's names"
    )
