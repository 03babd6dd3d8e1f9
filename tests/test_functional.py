"""`ogdopt.project`: a pure function that is a step's projection."""

import pickle

import pytest
import torch
from hypothesis import given

import ogdopt
from ogdopt import PairedGradient, projection
from tests.gradients import norm, pairs, reference


@given(pairs(scales=(-20, 20), dtypes=(torch.float32, torch.float64)))
def test_it_is_definition_4_1(case):
    ws, ls, _, _ = case
    kept = [g.clone() for g in (*ws, *ls)]
    found = ogdopt.project(ws, ls)
    assert all(torch.equal(x, y) for x, y in zip(kept, (*ws, *ls)))
    assert norm([x - u for x, u in zip(found, reference(ws, ls))]) <= 1e-6 * norm(ws)
    assert all(x.dtype == w.dtype and x.data_ptr() != w.data_ptr() for x, w in zip(found, ws))
    alone = ogdopt.project(ws[0], ls[0])
    assert torch.equal(alone, ogdopt.project(ws[:1], ls[:1])[0])


def test_what_is_missing_counts_as_zeros():
    w, l = torch.randn(4), torch.randn(4) + 1
    found = ogdopt.project([w, None, w, None], [l, l, None, None])
    assert found[3] is None
    expected = ogdopt.project([w, torch.zeros(4), w], [l, l, torch.zeros(4)])
    assert all(torch.equal(x, y) for x, y in zip(found[:3], expected))
    assert torch.equal(ogdopt.project(w, None), w)


def test_rules_scopes_types_and_layouts():
    w = torch.randn(3, 50, dtype=torch.bfloat16).t().requires_grad_()
    l = torch.randn(50, 3)
    found = ogdopt.project([w, w], [l, 2 * l], "normalized", scope="tensor")
    assert found[0].dtype == torch.bfloat16 and found[0].stride() == w.stride() and not found[0].requires_grad
    assert torch.allclose(found[0].float(), w / w.float().norm() - l / l.norm(), atol=2e-2)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([torch.ones(2)], []), "got 1 gradients of the winner and 0 of the loser"),
        ((torch.ones(2), torch.ones(3)), r"shapes \(2,\) \(winner\) and \(3,\) \(loser\)"),
        (([None], [None]), "found no gradient"),
        ((torch.ones(2), torch.ones(2), "orthogonl"), "rule is 'orthogonl'; expected one of orthogonal"),
    ],
)
def test_what_cannot_be_projected(arguments, said):
    with pytest.raises(ValueError, match=said):
        ogdopt.project(*arguments)


RULES = [*projection.RULES.values(), projection.interval(0.3), projection.scaled(projection.normalized, 0.5)]


@pytest.mark.parametrize("rule", RULES, ids=[*projection.RULES, "interval", "scaled"])
def test_rules_go_through_pickle(rule):
    p = torch.nn.Parameter(torch.ones(3))
    opt = pickle.loads(pickle.dumps(PairedGradient(torch.optim.Adam([p]), rule)))
    numbers = ogdopt.Gram(*torch.tensor([[2.0], [1.0], [4.0]], dtype=torch.float64))
    assert all(torch.equal(x, y) for x, y in zip(opt.rule(numbers), rule(numbers)))


def test_everything_of_projection_leaves_the_builtins_alone():
    names = {}
    exec("from ogdopt.projection import *", names)
    assert "sum" not in names and names["RULES"]["sum"] is projection.difference
    assert repr(projection.scaled(projection.interval(0.25), 2.0)) == "scaled(interval(0.25), 2.0)"
