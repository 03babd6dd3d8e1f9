"""What a step's two gradients say of both log-probabilities, as entries of a metrics line."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from torch import nn

from ogdopt.diagnostics import by_layer, entanglement
from ogdopt.gram import Gram
from ogdopt_harness.common import keys


def layers(tensors: Gram, model: nn.Module) -> dict[str, float]:
    """`entanglement/layer/<layer>`: the cosine of the two gradients in each layer."""
    return {f"{keys.LAYER}{layer}": cosine for layer, cosine in by_layer(tensors, model).items()}


def over_pairs(numbers: Sequence[Gram]) -> dict[str, float]:
    """The mean over pairs of what each pair's two gradients say (of conditions: their share), and the most frequent case."""
    each = [entanglement(gram) for gram in numbers]
    mean = {key: statistics.fmean(found[key] for found in each) for key in each[0]}
    return mean | {keys.CASE: statistics.mode(found[keys.CASE] for found in each)}
