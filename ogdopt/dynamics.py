"""How the examples of a preference lie in feature space, which says how fast it is learned.

After "learning dynamics of alignment" (Im and Li 2024, "LD"). Embeddings are last hidden states after the final norm, at the
prompt's last token. A behaviour is two classes of prompts, whose preferred answers are "Yes" and "No".
"""

from __future__ import annotations

import torch
from torch import Tensor


def separation(positive: Tensor, negative: Tensor, boundary: Tensor | None = None) -> dict[str, float]:
    """How far apart two classes of embeddings lie, (n, d) and (m, d), and how concentrated each is. LD, section 4.

    - `dynamics/distinguishability`: the norm of the difference of their means.
    - `dynamics/concentration`: the largest variance in any direction of either class.
    - `dynamics/trace`: the larger of their total variances.
    - `dynamics/spread`: the concentration over the squared distinguishability, without a unit; smaller is better separated.
    - `dynamics/boundary_cosine`: the cosine of `boundary`, (d,), with the difference of the means. `boundary` is the difference
      of the two answers' rows of the unembedding.

    Raises ValueError unless both are matrices of equal width with rows.
    """
    for name, x in (("positive", positive), ("negative", negative)):
        if x.ndim != 2 or not len(x) or x.shape[1] != positive.shape[1]:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; expected one embedding a row, (n, {positive.shape[-1]}), n >= 1"
            )
    difference = means(positive, negative)
    squares = [torch.linalg.svdvals(x.double() - x.double().mean(0)) ** 2 / len(x) for x in (positive, negative)]
    length, concentration = float(difference.norm()), max(float(s.max()) for s in squares)
    found = {
        "dynamics/distinguishability": length,
        "dynamics/concentration": concentration,
        "dynamics/trace": max(float(s.sum()) for s in squares),
    }
    if length > 0:
        found["dynamics/spread"] = concentration / length**2
    if boundary is not None:
        cosine = torch.nn.functional.cosine_similarity(boundary.double(), difference, dim=0)
        found["dynamics/boundary_cosine"] = float(cosine)
    return found


def means(positive: Tensor, negative: Tensor) -> Tensor:
    """The difference of the classes' means, (d,), in float64: b in LD."""
    return positive.double().mean(0) - negative.double().mean(0)


def priority(differences: Tensor) -> Tensor:
    """Priority levels of m behaviours that are learned together, from their mean differences (m, d): (m,). LD, equation (5).

    `P_i = <b_mean, b_i> / (|b_mean| |b_longest|)`: what the first step does for behaviour i, as a share of the most that it
    could do. Raises ValueError where they cancel each other.

    >>> priority(torch.tensor([[3.0, 0.0], [0.0, 1.0]])).tolist()
    [0.9486832980505138, 0.10540925533894598]
    """
    b = differences.double()
    mean = b.mean(0)
    scale = mean.norm() * b.norm(dim=1).max()
    if not scale > 0:
        raise ValueError("the differences of the behaviours add up to zero, so none of them has priority")
    return b @ mean / scale
