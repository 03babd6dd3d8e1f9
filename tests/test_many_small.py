"""Many small tensors go through together, and what changes of them between steps is noticed all the same."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from ogdopt import ProjectedGradient, native, passes
from ogdopt.stored import Stored
from tests.gradients import inner


def transposed(x):
    return x.t().contiguous().t()


CHANGES = {
    "nothing": lambda ps, base: None,
    "storage": lambda ps, base: setattr(ps[1], "data", ps[1].data.clone()),
    "strides": lambda ps, base: setattr(ps[2], "data", transposed(ps[2].data)),
    "frozen": lambda ps, base: ps[3].requires_grad_(False),
    "lr": lambda ps, base: base.param_groups[0].update(lr=0.5),
    "another group": lambda ps, base: base.add_param_group({"params": [ps.pop()], "lr": 0.25}),
}


def trained(kind, change, fused, options):
    torch.manual_seed(0)
    ps = [nn.Parameter(torch.randn(4, 6)) for _ in range(9)]
    every, held = [*ps], [*ps]
    base = kind([{"params": ps[:4]}, {"params": ps[4:8]}], lr=0.01)
    opt = ProjectedGradient(base, max_norm=1.0, fused=fused, **options)
    for k in range(6):
        if k == 3:
            CHANGES[change](held, base)
        there = [p for group in base.param_groups for p in group["params"] if p.requires_grad]
        ws = [torch.randn(4, 6) for _ in every]
        for context, add in ((opt.loser, 0.7), (opt.winner, 0.0)):
            with context():
                for p, w in zip(there, ws):
                    p.grad = w + add
        opt.step()
    assert opt.unfused == ""
    return every, base


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", [SGD, Adam, AdamW, RMSprop])
def test_what_changes_between_steps_is_noticed(kind, change):
    ours, base = trained(kind, change, True, {})
    expected, plain = trained(kind, change, False, {})
    for p, q in zip(ours, expected):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    for p, q in zip(ours, expected):
        assert base.state.get(p, {}).get("step") == plain.state.get(q, {}).get("step")


def test_a_loser_that_waits_in_bfloat16_steps_alike_fused_and_not():
    ours, _ = trained(AdamW, "lr", True, {"set_aside": torch.bfloat16})
    expected, _ = trained(AdamW, "lr", False, {"set_aside": torch.bfloat16})
    for p, q in zip(ours, expected):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_small_gradients_that_wait_in_bfloat16_are_stacked():
    torch.manual_seed(0)
    ws = [torch.randn(4, 6) for _ in range(12)]
    ls = [Stored(torch.randn(4, 6) if i % 3 else torch.randn(6, 4).t(), torch.bfloat16) for i in range(12)]
    stacks, rest = passes._stacks(ws, ls)
    assert stacks == [[i for i in range(12) if i % 3]] and rest == [0, 3, 6, 9]
    found = passes.rows(ws, ls, torch.device("cpu"))
    whole = [l.restored() for l in ls]
    for row, w, l in zip(found.tolist(), ws, whole):
        assert row == pytest.approx([inner([w], [w]), inner([w], [l]), inner([l], [l])], rel=1e-9, abs=1e-9)
    mixed = [w.clone() for w in ws]
    passes.mix_all(mixed, ls, torch.full((12,), 0.5).double(), torch.full((12,), -0.3).double())
    for got, w, l in zip(mixed, ws, whole):
        torch.testing.assert_close(got, (0.5 * w.double() - 0.3 * l.double()).float())


def test_a_row_whose_tensors_differ_in_size_is_not_given_to_the_loops():
    columns = [[torch.zeros(8), torch.zeros(8), torch.zeros(8)], [torch.zeros(8), torch.zeros(9), torch.zeros(8)]]
    assert native.unfit(columns, 1) == {1}
    columns[0][2] = columns[0][2].double()
    assert native.unfit(columns, 1) == {1, 2}
    assert native.unfit([[torch.zeros(8)], [None]], 1) == set()
    half = torch.zeros(8, dtype=torch.bfloat16)
    assert native.unfit([[torch.zeros(8)], [half]], 1) == set() and native.unfit([[half], [torch.zeros(8)]], 1) == {0}


def test_counters_of_steps_are_counted_in_one_call_or_left_to_torch():
    counters = [torch.tensor(float(i)) for i in range(5)]
    versions = [x._version for x in counters]
    read = native.count(counters, 0)
    assert read is not None and read.tolist() == [0, 1, 2, 3, 4] and [x._version for x in counters] == versions
    counted = native.count(counters, 1)
    assert counted is not None and counted.tolist() == [1, 2, 3, 4, 5] == [x.item() for x in counters]
    assert all(x._version > v for x, v in zip(counters, versions))
    assert native.count([counters[0], torch.tensor(1.0, dtype=torch.float64)], 1) is None and counters[0] == 1
