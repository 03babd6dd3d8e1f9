"""What a step of each schedule costs over the step on one objective that it makes.

    python -m benchmarks.objectives --rounds 9

A small Mistral on one thread, two objectives of as many tokens each: a preference loss of pairs and a supervised loss. A round
is ten steps of a schedule, each followed by the same step on the loss that it chose, called directly (for the mixed objective,
which chooses none: on the two in turns). The ratio is of the CPU times of these ten and ten, the median over rounds.
"Decision" is the CPU time of a schedule's step over losses that cost nothing, in microseconds. Results go to
benchmarks/results/objectives.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers import MistralForCausalLM

from benchmarks import common
from ogdopt import AlternatingObjective, MaxGapObjective, MixedObjective, SequentialObjective
from ogdopt.objectives import Objective

WEIGHTS = {"preference": 0.5, "sft": 0.5}
SCHEDULES: dict[str, Callable[[], Objective]] = {
    "AlternatingObjective (ALRIGHT)": lambda: AlternatingObjective(WEIGHTS),
    "SequentialObjective": lambda: SequentialObjective({"preference": 5, "sft": 5}),
    "MaxGapObjective, evaluate_every=10": lambda: MaxGapObjective(WEIGHTS, evaluate_every=10),
    "MaxGapObjective, evaluate_every=1 (MAXRIGHT)": lambda: MaxGapObjective(WEIGHTS, evaluate_every=1),
    "MixedObjective": lambda: MixedObjective(WEIGHTS),
}
STEPS, SEQUENCES, TOKENS = 10, 4, 128


def losses() -> tuple[MistralForCausalLM, dict[str, Callable[[], torch.Tensor]]]:
    """The model and a closure for either objective, over the same number of sequences and tokens."""
    model = common.mistral("5M", num_hidden_layers=4, vocab_size=2000)
    ids = {name: torch.randint(model.config.vocab_size, (SEQUENCES, TOKENS)) for name in WEIGHTS}

    def logps(x: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=x).logits[:, :-1].log_softmax(-1)
        return logits.gather(-1, x[:, 1:, None]).squeeze(-1).sum(-1)

    def preference() -> torch.Tensor:
        chosen, rejected = logps(ids["preference"]).chunk(2)
        return torch.nn.functional.softplus(-0.1 * (chosen - rejected)).mean()

    return model, {"preference": preference, "sft": lambda: -logps(ids["sft"]).mean() / TOKENS}


def measure(make: Callable[[], Objective], rounds: int) -> dict[str, float]:
    """Median and range of the ratios of one schedule."""
    model, closures = losses()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=False)
    objective = make()

    def step(loss: Callable[[], torch.Tensor]) -> float:
        start = time.process_time()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        return time.process_time() - start

    ratios = []
    for _ in range(rounds + 1):  # the first one warms up
        spent = plain = 0.0
        for k in range(STEPS):
            spent += step(lambda: objective(closures))
            chosen = objective.chosen
            plain += step(closures[chosen if isinstance(chosen, str) else sorted(WEIGHTS)[k % 2]])
        ratios.append(spent / plain)
    ratios = ratios[1:]
    free = {name: lambda: torch.ones(()) for name in WEIGHTS}
    objective = make()
    start = time.process_time()
    for _ in range(2000):
        objective(free)
    decision = 1e6 * (time.process_time() - start) / 2000
    return common.spread(ratios) | {"decision_us": decision}


def main(words: list[str]) -> None:
    """Measure every schedule and print the table."""
    parser = common.parser(__doc__, "objectives")
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args(words)
    torch.set_num_threads(1)
    results = {name: measure(make, asked.rounds) for name, make in SCHEDULES.items()}
    rows = [[name, common.times(found), f"{found['decision_us']:.0f} µs"] for name, found in results.items()]
    common.show("", ["schedule", "CPU time of a step", "decision"], rows)
    common.record(asked.output, results)


if __name__ == "__main__":
    common.start(main)
