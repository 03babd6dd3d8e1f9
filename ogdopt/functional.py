"""The projection as a pure function, for those who hold the two gradients themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ogdopt.distributed import settled
from ogdopt.gram import blocks_of, gram
from ogdopt.passes import mix_all
from ogdopt.projection import RULES, Rule, Scope, block_sizes, orthogonal


@overload
def project(
    winner: Tensor,
    loser: Tensor | None,
    rule: Rule | str = ...,
    *,
    scope: Scope = ...,
    process_group: dist.ProcessGroup | None = ...,
) -> Tensor: ...
@overload
def project(
    winner: Sequence[Tensor | None],
    loser: Sequence[Tensor | None],
    rule: Rule | str = ...,
    *,
    scope: Scope = ...,
    process_group: dist.ProcessGroup | None = ...,
) -> list[Tensor | None]: ...
@torch.no_grad()
def project(
    winner: Any,
    loser: Any,
    rule: Rule | str = orthogonal,
    *,
    scope: Scope = "global",
    process_group: dist.ProcessGroup | None = None,
) -> Any:
    """The mixture `a g_w + b g_l` of two gradients by a rule, as new tensors in the type of `winner`; nothing is changed.

    `winner` and `loser` are two tensors of one shape, or two lists of them that make up one gradient each. None in a list
    counts as zeros, and stays None where both are. `rule` is a function of `ogdopt.projection` or the name of one; `scope`
    says whether all tensors share coefficients ("global") or none ("tensor"). Products are exact as in a step. A gradient that
    is not finite gives NaN. Under torch.distributed it is a collective over the ranks that share the gradients, like a step.

    Raises ValueError for lists of different length, tensors of different shape, an unknown rule or scope, or no gradient.

    >>> import torch
    >>> project(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0])).tolist()  # Definition 4.1
    [0.0, 1.0]
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"rule is {rule!r}; expected one of {', '.join(RULES)}, or a function")
        rule = RULES[rule]
    alone = isinstance(winner, Tensor)
    ws, ls = ([winner], [loser]) if alone else (list(winner), list(loser))
    _check(ws, ls, scope)
    sizes = block_sizes(scope, [len(ws)])
    ls = [None if l is None else settled(l, l).detach() for l in ls]
    made = [_copy(w, l) for w, l in zip(ws, ls)]
    blocks = gram([None if w is None else x for w, x in zip(ws, made)], ls, process_group).pooled(sizes)
    a, b = rule(blocks)
    places = [i for i, x in enumerate(made) if x is not None]
    blocks_there = [blocks_of(sizes)[i] for i in places]
    mix_all([x for x in made if x is not None], [ls[i] for i in places], a[blocks_there], b[blocks_there])
    return made[0] if alone else made


def _copy(w: Tensor | None, l: Tensor | None) -> Tensor | None:
    if w is not None:
        return settled(w, w).detach().clone(memory_format=torch.preserve_format)
    return None if l is None else torch.zeros_like(l)


def _check(ws: Sequence[Any], ls: Sequence[Any], scope: Scope) -> None:
    if scope == "group":
        raise ValueError("scope is 'group', and gradients by themselves have no groups; expected 'global' or 'tensor'")
    if len(ws) != len(ls):
        raise ValueError(f"project() got {len(ws)} gradients of the winner and {len(ls)} of the loser; expected as many")
    for i, (w, l) in enumerate(zip(ws, ls)):
        if w is not None and l is not None and w.shape != l.shape:
            raise ValueError(
                f"project() got gradient {i} in the shapes {tuple(w.shape)} (winner) and {tuple(l.shape)} (loser); expected "
                "one shape, since both belong to one parameter"
            )
