"""What TAX says of models whose truth is known, at the sizes of the paper's eight benchmarks.

    python -m benchmarks.tax_noise [--repetitions 200]

Outcomes are simulated: plausible accuracies of a 7B model, a share of items that the tuned model answers otherwise by chance,
and a true loss. Printed: the mean estimate, the sign-flip null's mean, how often p < 0.05, and how often the interval holds the
truth. For equally good models that share is what a report's "inside the noise floor" rests on.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from benchmarks import common
from ogdopt_harness.analysis.study_reader import Answers, Evaluation
from ogdopt_harness.analysis.tax import compare, tax

SIZES = {  # items, accuracy, chance
    "piqa": (1838, 0.82, 0.5),
    "social_iqa": (1954, 0.53, 0.33),
    "hellaswag": (10042, 0.81, 0.25),
    "arc_easy": (2376, 0.80, 0.25),
    "arc_challenge": (1172, 0.55, 0.25),
    "mmlu": (14042, 0.58, 0.25),
    "gsm8k": (1319, 0.40, 0.0),
    "boolq": (3270, 0.83, 0.5),
}
TRUTHS = {  # share of flips, relative loss by task
    "no change, 5% flips": (0.05, [0.0] * 8),
    "no change, 15% flips": (0.15, [0.0] * 8),
    "-2% on three, +1% on five": (0.05, [0.02] * 3 + [-0.01] * 5),
    "-20% everywhere": (0.05, [0.2] * 8),
}
PAPER = -0.1638  # OGD on Magpie-Pro


def answers(rng: np.random.Generator, right: np.ndarray, flips: float, loss: float) -> np.ndarray:
    """Outcomes of a model that is right with probability p (1 - loss), where the reference is with p; `flips` disagree."""
    p = right.mean()
    gained = max(0.0, -loss * p, (flips - loss * p) / 2)  # shares of all items
    lost, draw = gained + loss * p, rng.random(len(right))
    return np.where(right, draw >= lost / p, draw < gained / (1 - p))


def main(words: list[str]) -> None:
    """Simulate, and print one row a truth."""
    parser = common.parser(__doc__, "tax_noise")
    parser.add_argument("--repetitions", type=int, default=200)
    asked = parser.parse_args(words)
    rng, started = np.random.default_rng(0), time.process_time()
    results: dict[str, dict[str, float]] = {}
    for name, (flips, losses) in TRUTHS.items():
        truth = tax([1.0] * 8, [1 - loss for loss in losses])
        found = []
        for repetition in range(asked.repetitions):
            base = {task: rng.random(n) < p for task, (n, p, _) in SIZES.items()}
            tuned = {task: answers(rng, right, flips, loss) for (task, right), loss in zip(base.items(), losses)}
            pair = [
                Evaluation(label, {t: {"direct": Answers(o[t], ("",) * len(o[t]), SIZES[t][2])} for t in SIZES})
                for label, o in (("reference", base), ("tuned", tuned))
            ]
            found.append(compare(pair[0], {"tuned": pair[1]}, samples=2000, seed=repetition)["tuned"])
        values = np.array([t.value for t in found])
        results[name] = {
            "TAX": truth,
            "mean": float(values.mean()),
            "null": float(np.mean([t.null_mean for t in found])),
            "p<.05": float(np.mean([t.p_value < 0.05 for t in found])),
            "covered": float(np.mean([t.low <= truth <= t.high for t in found])),
            "<= paper": float(np.mean(values <= PAPER)),
        }
    columns = ["truth", *next(iter(results.values()))]
    common.show("", columns, [[name, *(f"{x:.2f}" for x in row.values())] for name, row in results.items()])
    print(f"{time.process_time() - started:.0f} s of CPU time")
    common.record(asked.output, results)


if __name__ == "__main__":
    main(sys.argv[1:])
