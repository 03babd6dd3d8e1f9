"""Entanglement: Condition 1 and 2 are the signs of the first-order changes, and the fourth case cannot happen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ogdopt.diagnostics import entanglement
from ogdopt.gram import gram
from tests.gradients import inner, norm, pairs


@given(pairs(kinds=("random", "nearly parallel", "conflicting"), dtypes=(torch.float64,), scales=(-3, 3)), st.floats(0.05, 20))
def test_conditions_are_the_signs_of_the_predicted_changes(case, ratio):
    """Delta a = eta (d_w ww - d_l wl) and Delta b = eta (d_w wl - d_l ll) with d_w/d_l = ratio (SPEC 4.3)."""
    ws, ls, _, _ = case
    report = entanglement(gram(ws, ls), ratio)
    ww, wl, ll = inner(ws, ws), inner(ws, ls), inner(ls, ls)
    slack = 1e-12 * (ww + ll)
    if abs(ratio * ww - wl) > slack:
        assert report["entanglement/condition_chosen"] == float(ratio * ww - wl >= 0)
    if abs(ratio * wl - ll) > slack:
        assert report["entanglement/condition_rejected"] == float(ratio * wl - ll <= 0)
    assert report["entanglement/condition_chosen"] or report["entanglement/condition_rejected"]
    assert report["entanglement/inner_product"] == pytest.approx(wl, abs=1e-9 * (ww * ll) ** 0.5)
    assert report["entanglement/norm_chosen"] == pytest.approx(norm(ws))


@pytest.mark.parametrize(("ww", "ll", "case"), [(3.0, 3.0, 1.0), (1.0, 9.0, 2.0), (9.0, 1.0, 3.0)])
def test_cases_of_table_1(ww, ll, case):
    numbers = gram([torch.tensor([ww**0.5])], [torch.tensor([ll**0.5])])._replace(wl=torch.tensor([2.0]))
    assert entanglement(numbers)["entanglement/case"] == case


def test_zero_gradients_have_cosine_zero():
    assert entanglement(gram([torch.zeros(3)], [torch.ones(3)]))["entanglement/cosine"] == 0.0


def test_the_ratio_must_be_positive():
    with pytest.raises(ValueError, match="weight_ratio is 0"):
        entanglement(gram([torch.ones(1)], [torch.ones(1)]), 0)
