"""TAX: hand examples, what two equally good models score, and whether the intervals hold the truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ogdopt_harness.analysis.study_reader import Answers, Evaluation
from ogdopt_harness.analysis.tax import combine, compare, difference, reduction, tax, unanswered, wilson


def evaluation(file="reference.json", *, chance=0.25, strata=None, way="direct", hashes="q", **tasks):
    """An evaluation from lists of outcomes."""
    return Evaluation(
        file,
        {
            name: {way: Answers(np.array(o, dtype=bool), tuple(f"{hashes}{i}" for i in range(len(o))), chance, strata)}
            for name, o in tasks.items()
        },
    )


def coins(rng, n, p):
    return rng.random(n) < p


def test_hand_example():
    """p = (8/10, 5/10), q = (6/10, 6/10): TAX = 100/2 · (6/8 − 1) = −12.5; signed = 100/2 · (−1/4 + 1/5) = −2.5."""
    reference = evaluation(a=[1] * 8 + [0] * 2, b=[1] * 5 + [0] * 5)
    model = evaluation("m.json", a=[1] * 6 + [0] * 4, b=[1] * 6 + [0] * 4)
    found = compare(reference, {"m": model}, samples=200)["m"]
    assert found.value == pytest.approx(-12.5)
    assert found.signed == pytest.approx(-2.5)
    assert (found.tasks["a"].lost, found.tasks["a"].gained, found.tasks["b"].gained) == (2, 0, 1)
    assert found.value == pytest.approx(tax([0.8, 0.5], [0.6, 0.6]))
    assert found.low <= found.value <= found.high <= 0


def test_signed_standard_error_by_hand():
    """One task, a = (1,1,1,0), b = (1,1,0,0): r = 2/3, g = (b − r a)/p = (4/9, 4/9, −8/9, 0), mean 0, var 24/81."""
    found = compare(evaluation(a=[1, 1, 1, 0]), {"m": evaluation(a=[1, 1, 0, 0])}, samples=10)["m"]
    assert found.signed_se == pytest.approx(100 * ((96 / 81 / 4) / 4) ** 0.5)


def test_paper_headline_arithmetic():
    """Table 1 of the paper: OGD −0.1638, DPO −19.2612: 1 − 0.1638/19.2612 = 99.15%."""
    n = 100_000
    reference = evaluation(a=[1] * n)
    rest = {name: evaluation(a=[0] * lost + [1] * (n - lost)) for name, lost in (("ogd", 164), ("dpo", 19_261))}
    found = compare(reference, rest, samples=500)
    share = reduction(found["ogd"], found["dpo"])
    assert share is not None
    assert round(100 * share.value, 2) == round(100 * (1 - 0.1638 / 19.2612), 2) == 99.15


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0, 1)), min_size=1, max_size=9))
def test_range(pairs):
    p, q = zip(*pairs)
    assert -100 <= tax(p, q) <= 0
    assert tax(p, p) == 0
    assert tax(p, np.zeros(len(p))) == pytest.approx(-100)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 60))
def test_everything_stays_in_range(seed, n):
    rng = np.random.default_rng(seed)
    reference = evaluation(a=[1, *coins(rng, n, 0.5)], b=[1, *coins(rng, n, 0.9)], chance=0.0)
    models = {str(k): evaluation(a=coins(rng, n + 1, 0.5), b=coins(rng, n + 1, 0.5)) for k in range(3)}
    found = compare(reference, models, samples=50, seed=seed)
    for t in found.values():
        assert -100 <= t.low <= t.high <= 0
        assert -100 <= t.value <= 0
        assert t.signed >= t.value - 1e-9
        assert 0 < t.p_value <= 1
        assert ((t.draws >= -100) & (t.draws <= 0)).all()


def test_equal_models_score_zero():
    rng = np.random.default_rng(0)
    reference = evaluation(a=coins(rng, 50, 0.8), b=coins(rng, 80, 0.6))
    t = compare(reference, {"m": reference}, samples=100)["m"]
    assert (t.value, t.low, t.high, t.null_mean, t.p_value, t.signed, t.signed_se) == (0, 0, 0, 0, 1, 0, 0)
    assert not t.detectable


def noisy_pair(rng, n=150, tasks=4, p=0.9, flips=0.06):
    """Two equally good models that disagree on some items."""
    truth = {f"t{k}": coins(rng, n, p) for k in range(tasks)}
    return [evaluation(f"{m}.json", **{k: a ^ coins(rng, n, flips) for k, a in truth.items()}) for m in ("reference", "model")]


def test_equally_good_models_score_below_zero_and_the_null_says_so():
    rng = np.random.default_rng(1)
    found = [compare(a, {"m": b}, samples=300)["m"] for a, b in (noisy_pair(rng) for _ in range(60))]
    values, nulls = np.array([t.value for t in found]), np.array([t.null_mean for t in found])
    assert (nulls < 0).all()
    assert values.mean() == pytest.approx(nulls.mean(), abs=0.35)
    assert np.mean([t.detectable for t in found]) < 0.15


def test_basic_interval_covers_where_the_percentile_interval_does_not():
    rng = np.random.default_rng(2)
    basic = held = percentile = 0
    for _ in range(100):
        a, b = noisy_pair(rng, tasks=8, flips=0.03)
        t = compare(a, {"m": b}, samples=400)["m"]
        basic += 2 * t.value - np.quantile(t.draws, 0.025) >= 0
        held += t.low <= 0 <= t.high
        percentile += np.quantile(t.draws, 0.975) >= 0
    assert basic >= 80
    assert held >= 90
    assert percentile <= 25


def test_the_mean_of_seeds_of_equally_good_models_still_holds_zero():
    """Averaging seeds narrows the interval but keeps TAX's bias; the null is averaged too and keeps 0 inside."""
    rng = np.random.default_rng(9)
    pairs = [[noisy_pair(rng, p=0.7, flips=0.04) for _ in range(3)] for _ in range(50)]
    means = [combine([compare(a, {"m": b}, samples=300, seed=s)["m"] for s, (a, b) in enumerate(trio)]) for trio in pairs]
    assert sum(t.high == 0 for t in means) >= 44
    assert sum(2 * t.value - np.quantile(t.draws, 0.025) >= 0 for t in means) < 44


def test_real_forgetting_is_found_and_its_interval_holds_the_truth():
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(60):
        a, _ = noisy_pair(rng, flips=0)
        b = evaluation("b.json", **{k: w["direct"].outcomes & coins(rng, 150, 0.8) for k, w in a.tasks.items()})
        t = compare(a, {"m": b}, samples=300)["m"]
        held += t.low <= -20 <= t.high
        assert t.detectable
        assert t.clearly_below_null
    assert held >= 52


def test_joint_draws_make_differences_sharp():
    """Two models that lost nearly the same items differ far less surely apart than drawn together."""
    rng = np.random.default_rng(4)
    a, _ = noisy_pair(rng, flips=0)
    outcomes = {k: w["direct"].outcomes & coins(rng, 150, 0.7) for k, w in a.tasks.items()}
    worse = {k: o & coins(rng, 150, 0.97) for k, o in outcomes.items()}
    found = compare(a, {"x": evaluation("x", **outcomes), "y": evaluation("y", **worse)}, samples=1000)
    gap = difference(found["x"], found["y"])
    assert gap.value == pytest.approx(found["x"].value - found["y"].value)
    assert gap.excludes_zero
    assert gap.value > 0
    assert gap.high - gap.low < found["x"].high - found["x"].low
    with pytest.raises(ValueError, match="one compare"):
        difference(found["x"], compare(a, {"y": evaluation("y", **worse)}, samples=1000, seed=1)["y"])


def test_ratio_only_to_a_model_that_clearly_forgot():
    rng = np.random.default_rng(5)
    a, b = noisy_pair(rng)
    lost = evaluation("lost", **{k: w["direct"].outcomes & coins(rng, 150, 0.7) for k, w in a.tasks.items()})
    found = compare(a, {"same": b, "lost": lost}, samples=500)
    assert reduction(found["lost"], found["same"]) is None
    share = reduction(found["same"], found["lost"])
    assert share is not None
    assert share.value == pytest.approx(1 - found["same"].value / found["lost"].value)
    assert share.low <= share.value <= 1
    assert share.high <= 1
    assert 0.8 < share.ceiling < 1


def test_strata_are_drawn_apart():
    """Subjects in which all items agree add no variance once they are strata; pooled accuracy is weighted by size."""
    reference = [1] * 90 + [1] * 10
    model = [1] * 90 + [0] * 10
    strata = np.array([0] * 90 + [1] * 10)
    plain = compare(evaluation(a=reference), {"m": evaluation(a=model)}, samples=500)["m"]
    split = compare(evaluation(a=reference, strata=strata), {"m": evaluation(a=model)}, samples=500)["m"]
    assert plain.value == split.value == pytest.approx(-10)
    assert plain.signed_se > 1
    assert split.signed_se == pytest.approx(0, abs=1e-9)
    assert (split.low, split.high) == pytest.approx((-10, -10))


def test_the_same_seed_gives_the_same_numbers():
    a, b = noisy_pair(np.random.default_rng(6))
    runs = [compare(a, {"m": b}, samples=200, seed=s)["m"] for s in (0, 0, 1)]
    assert (runs[0].draws == runs[1].draws).all()
    assert (runs[0].low, runs[0].p_value) == (runs[1].low, runs[1].p_value)
    assert not (runs[0].draws == runs[2].draws).all()


def test_blocks_of_draws_change_nothing(monkeypatch):
    a, b = noisy_pair(np.random.default_rng(7))
    whole = compare(a, {"m": b}, samples=300)["m"].draws
    monkeypatch.setattr("ogdopt_harness.analysis.tax.BLOCK", 64)
    blocks = compare(a, {"m": b}, samples=300)["m"].draws
    assert blocks.std() == pytest.approx(whole.std(), rel=0.3)
    assert len(blocks) == 300


def test_seeds_combine():
    pairs = [noisy_pair(np.random.default_rng(s)) for s in range(3)]
    found = [compare(a, {"m": b}, samples=500, seed=s)["m"] for s, (a, b) in enumerate(pairs)]
    mean = combine(found)
    assert mean.value == pytest.approx(np.mean([t.value for t in found]))
    assert mean.seeds == tuple(t.value for t in found)
    assert mean.tasks["t0"].n == 450
    assert mean.tasks["t0"].lost == sum(t.tasks["t0"].lost for t in found)
    assert mean.draws.std() < np.mean([t.draws.std() for t in found])
    assert combine(found[:1]) is found[0]
    with pytest.raises(ValueError, match="no TAX"):
        combine([])


def test_unsolved_task_raises_unless_left_out_by_name():
    reference = evaluation(a=[1, 1, 0], hard=[0, 0, 0])
    with pytest.raises(ValueError, match=r"reference\.json.*'hard'.*skip"):
        compare(reference, {"m": reference}, samples=10)
    assert unanswered(reference) == ["hard"]
    t = compare(reference, {"m": reference}, samples=10, skip=["hard"])["m"]
    assert list(t.tasks) == ["a"]
    assert any("'hard'" in w and "left out" in w for w in t.warnings)
    with pytest.raises(ValueError, match="no task was asked"):
        compare(reference, {"m": reference}, way="cloze", samples=10)


def test_chance_is_warned_of():
    rng = np.random.default_rng(8)
    reference = evaluation(guess=coins(rng, 100, 0.27), good=coins(rng, 100, 0.8))
    (warning,) = compare(reference, {"m": reference}, samples=10)["m"].warnings
    assert "'guess'" in warning
    assert "chance" in warning


def test_other_questions_are_refused():
    reference = evaluation("sft/epoch-1.json", facts=[1, 0])
    for bad in (evaluation("ogd/epoch-3.json", facts=[1, 0], hashes="other"), evaluation("ogd/epoch-3.json", facts=[1, 0, 1])):
        with pytest.raises(ValueError, match=r"'facts'.*sft/epoch-1\.json.*ogd/epoch-3\.json"):
            compare(reference, {"m": bad}, samples=10)
    with pytest.raises(ValueError, match=r"'facts'.*not in ogd\.json"):
        compare(reference, {"m": evaluation("ogd.json", sums=[1, 0])}, samples=10)


def test_wilson():
    """8 of 10 at 95%: (0.4902, 0.9433), e.g. Agresti and Coull's formula by hand."""
    assert wilson(8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert wilson(10, 10).high == 1
    assert wilson(0, 10).low == pytest.approx(0, abs=1e-9)
