"""Gradients that are remembered from one step to the next, as further constraints on a step.

A batch of eight says little about the direction that all rejected answers share. What is to be kept need not be asked for at
every step. `Remembered` holds a running mean of one side's gradients; `Subspace` a few directions that no step may take.
Both enter a step as further gradients (`ogdopt.cone`), and wait rounded if asked to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ogdopt import stored
from ogdopt.distributed import local, shared
from ogdopt.gram import Value, gradients
from ogdopt.passes import matrices, mix_many_
from ogdopt.stored import SetAside, Stored

FORMS = (None, torch.bfloat16, "int8")


class Remembered:
    """A running mean of a side's gradients: mean <- decay mean + (1 - decay) g, the first one taken as it is.

    A step respects the mean of the steps before it, next to its own batch's gradient. Where the step has none of that side, the
    mean stands alone: what is kept may then be asked for every few steps. A `decay` of 0.95 looks back over about twenty steps.
    `form` is how the mean waits: None as it is, `torch.bfloat16` or "int8" rounded. The running mean of retained gradients is
    GRU's (arXiv:2503.09117, decay 0.8 to 0.95).

    Raises ValueError for a decay outside [0, 1) and an unknown form.
    """

    sign: int | None = None
    """That of its side."""

    def __init__(self, decay: float = 0.95, form: SetAside = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay!r}; expected a number from 0 to below 1")
        _check(form)
        self.decay: float = decay
        self.form: SetAside = form
        self.steps: int = 0
        """Gradients that were taken in; the same on every rank, also where its shards are empty."""
        self._means: dict[int, Any] = {}

    def lists(self, count: int) -> list[list[Any]]:
        """The mean as one list of `count` gradients, by the place of the parameter; none before the first step."""
        return [[self._means.get(i) for i in range(count)]] if self.steps else []

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor], side: Mapping[Tensor, Any]) -> None:
        """Take a step's gradients of its side in."""
        share = 1.0 - self.decay if self.steps else 1.0
        self.steps += 1
        weights = torch.tensor([0.0, self.decay, share], dtype=torch.float64, device="cpu")
        for i, p in enumerate(parameters):
            g, mean = side.get(p), self._means.get(i)
            if g is not None or mean is not None:
                fresh = torch.zeros_like(p, requires_grad=False)
                mix_many_(fresh, [mean, g], weights)
                self._means[i] = fresh if self.form is None else Stored(fresh, self.form)

    def state_dict(self, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
        """The mean by the place of the parameter, zeros where there is none, in the parameters' layout and type."""
        means = {str(i): _restored(self._means.get(i), p) for i, p in enumerate(parameters)}
        return means | {"steps": torch.tensor(self.steps, device="cpu")}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a mean that was saved, on any number of ranks."""
        self.steps = int(state["steps"])
        means = {int(i): g.detach() for i, g in state.items() if i != "steps"}
        self._means = {i: g.clone() if self.form is None else Stored(g, self.form) for i, g in means.items()}


class Subspace:
    """Directions that a step must not take either way: those of a few reference gradients, orthonormalized (OGPSA).

    `values` are closures, each the loss of one reference example or batch (a scalar with a graph). Their gradients are taken
    once, here; the `rank` directions that hold most of them are kept (None: all that do not depend on others), in `form` like
    `Remembered`. While it is made all gradients are in memory. (OGPSA, arXiv:2602.07892.)

    Raises ValueError for no values, a rank that is not positive, and an unknown form.
    """

    sign: int | None = 0

    def __init__(
        self, parameters: Iterable[Tensor], values: Sequence[Value], rank: int | None = None, form: SetAside = None
    ) -> None:
        _check(form)
        if not values or (rank is not None and rank < 1):
            raise ValueError(f"got {len(values)} reference losses and rank {rank!r}; expected at least one loss and rank 1")
        self.form: SetAside = form
        self._basis: list[dict[int, Any]] = []
        held = list(parameters)
        found = [gradients(value, held)[1] for value in values]
        self._keep(held, found, len(found) if rank is None else rank)

    @torch.no_grad()
    def _keep(self, parameters: Sequence[Tensor], found: list[list[Tensor | None]], rank: int) -> None:
        some = [next((g for g in gs if g is not None), None) for gs in zip(*found)]
        ranks = shared([p if g is None else g for p, g in zip(parameters, some)], None)
        rows = matrices(found, local(parameters[0]).device)
        products = ranks.pooled(list(rows.flatten(1)), [len(parameters)]).view(len(found), len(found)).cpu()
        values, vectors = torch.linalg.eigh(products)
        for value, vector in list(zip(values, vectors.T))[::-1][:rank]:
            if value <= 1e-12 * values[-1] or value <= 0:
                break
            weights = torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), vector / value.sqrt()])
            basis: dict[int, Any] = {}
            for i, p in enumerate(parameters):
                gs = [one[i] for one in found]
                if any(g is not None for g in gs):
                    direction = torch.zeros_like(p, requires_grad=False)
                    mix_many_(direction, gs, weights)
                    basis[i] = direction if self.form is None else Stored(direction, self.form)
            self._basis.append(basis)

    @property
    def rank(self) -> int:
        """Number of directions."""
        return len(self._basis)

    def lists(self, count: int) -> list[list[Any]]:
        """The directions, each as a list of `count` gradients by the place of the parameter."""
        return [[basis.get(i) for i in range(count)] for basis in self._basis]

    def update(self, parameters: Sequence[Tensor], side: Mapping[Tensor, Any]) -> None:
        """Nothing: the directions stay."""

    def state_dict(self, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
        """The directions, each parameter's part by its place."""
        return {f"{k}.{i}": _restored(b.get(i), p) for k, b in enumerate(self._basis) for i, p in enumerate(parameters)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The directions of a checkpoint in the place of these, as many."""
        for key, g in state.items():
            k, i = (int(x) for x in key.split("."))
            self._basis[k][i] = g.detach().clone() if self.form is None else Stored(g.detach(), self.form)


Memory = Remembered | Subspace


class Memories:
    """All that a paired optimizer remembers, in the two methods that checkpoint writers look for."""

    def __init__(self, memories: Mapping[str, Memory], parameters: Callable[[], Sequence[Tensor]]) -> None:
        self._memories, self._parameters = memories, parameters

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """By name; the same keys before the first step as after it, so that a distributed checkpoint can be loaded into it."""
        return {name: memory.state_dict(self._parameters()) for name, memory in self._memories.items()}

    def load_state_dict(self, state_dict: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Raises ValueError for a checkpoint of other names."""
        if state_dict.keys() != self._memories.keys():
            raise ValueError(f"the checkpoint remembers {sorted(state_dict)}; expected {sorted(self._memories)}")
        for name, memory in self._memories.items():
            memory.load_state_dict(state_dict[name])


def _check(form: Any) -> None:
    stored.check(form)
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; expected None, torch.bfloat16 or 'int8'")


def _restored(kept: Any, p: Tensor) -> Tensor:
    out = torch.zeros_like(p, requires_grad=False)
    if kept is not None:
        one = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")
        mix_many_(out, [kept], one)
    return out
