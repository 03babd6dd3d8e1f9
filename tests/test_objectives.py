"""Schedules of several objectives (SPEC 2.1, 2.2): definitions, expectations, what runs, what resumes, what ranks agree on."""

import copy
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ogdopt import AlternatingObjective, MaxGapObjective, MixedObjective, ProjectedGradient, SequentialObjective
from tests import limits
from tests.workers import objectives as worker

ROOT = Path(__file__).parent.parent
KINDS = ("mixed", "alternating", "sequential", "max_gap", "max_gap_3", "max_gap_once")
NAMES = ("sft", "preference", "retain")


def make(kind, weights, seed=0, optima=None):
    """A schedule of every kind over the same weights."""
    if kind == "mixed":
        return MixedObjective(weights)
    if kind == "alternating":
        return AlternatingObjective(weights, seed=seed)
    if kind == "sequential":
        return SequentialObjective({name: round(10 * w) for name, w in weights.items()})
    every = {"max_gap": 1, "max_gap_3": 3, "max_gap_once": None}[kind]
    return MaxGapObjective(weights, optima=optima, evaluate_every=every)


class Wandering:
    """Losses that wander as they please, and how often each was asked for with and without a graph."""

    def __init__(self, names, seed=0):
        self.x = {name: torch.nn.Parameter(torch.tensor(1.0 + NAMES.index(name), dtype=torch.float64)) for name in names}
        self.seed, self.step, self.graphs, self.plain = seed, 0, dict.fromkeys(names, 0), dict.fromkeys(names, 0)

    def value(self, name, step):
        return 1 + math.sin(NAMES.index(name) * 2.1 + self.seed + 0.9 * step) + 0.3 * math.cos(5 * step)

    def closures(self):
        return {name: lambda name=name: self._loss(name) for name in self.x}

    def _loss(self, name):
        (self.graphs if torch.is_grad_enabled() else self.plain)[name] += 1
        return self.x[name] * self.value(name, self.step)

    def run(self, objective, steps):
        """(chosen, loss) of each step."""
        said = []
        for _ in range(steps):
            loss = objective(self.closures())
            self.step += 1
            said.append((objective.chosen, loss.item()))
        return said


@st.composite
def weightings(draw, zero=False):
    """Weights in tenths of two or three objectives, in any order."""
    names = draw(st.permutations(NAMES[: draw(st.integers(2, 3))]))
    cuts = sorted(draw(st.integers(0 if zero else 1, 10 - (0 if zero else 1))) for _ in names[1:])
    parts = [b - a for a, b in zip([0, *cuts], [*cuts, 10])]
    if not zero and 0 in parts:
        parts = [8, 1, 1]
    return {name: part / 10 for name, part in zip(names, parts)}


# ---- expectation ---------------------------------------------------------------------------------------------------------


@given(weightings(zero=True), st.integers(0, 100))
def test_the_alternating_gradient_is_the_mixed_one_in_expectation(weights, seed):
    """Equation (11), exactly: the gradients of all possible steps, each with its weight, add up to the mixed gradient."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()
    targets = {name: torch.randn(4, generator=generator, dtype=torch.float64) for name in weights}
    closures = {name: lambda t=t: (theta - t).square().sum().exp().log1p() for name, t in targets.items()}
    (mixed,) = torch.autograd.grad(MixedObjective(weights)(closures), theta)
    expected, seen = torch.zeros(4, dtype=torch.float64), set()
    objective = AlternatingObjective(weights, seed=seed)
    while seen < set(objective.active):
        (g,) = torch.autograd.grad(objective(closures), theta)
        if objective.chosen not in seen:
            expected += weights[objective.chosen] * g
        seen.add(objective.chosen)
    torch.testing.assert_close(expected, mixed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", [{"a": 0.5, "b": 0.5}, {"a": 0.01, "b": 0.99}, {"a": 0.2, "b": 0.3, "c": 0.4, "d": 0.1}])
@pytest.mark.parametrize("seed", [0, 1, -5])
def test_frequencies_of_the_draw(weights, seed):
    """Within 4.5 standard deviations of the binomial; neighbours in time and across seeds are independent."""
    n = 20_000
    objectives = [AlternatingObjective(weights, seed=seed), AlternatingObjective(weights, seed=seed + 1)]
    mine, other = ([objective.choose() for _ in range(n)] for objective in objectives)
    for name, p in weights.items():
        bound = 4.5 * math.sqrt(n * p * (1 - p))
        assert abs(mine.count(name) - n * p) < bound
        for pairs in (list(itertools.pairwise(mine)), list(zip(mine, other))):
            q = p * p
            assert abs(pairs.count((name, name)) - len(pairs) * q) < 4.5 * math.sqrt(n * q * (1 - q) * 3)


def test_the_chosen_loss_comes_back_unweighted():
    losses = {name: torch.tensor(2.5, requires_grad=True) for name in ("a", "b")}
    closures = {name: lambda x=x: x for name, x in losses.items()}
    for kind in ("alternating", "sequential", "max_gap", "max_gap_3"):
        objective = make(kind, {"a": 0.3, "b": 0.7})
        assert objective(closures) is losses[objective.chosen]


# ---- the largest gap -----------------------------------------------------------------------------------------------------


def reference(weights, optima, every, loss, steps):
    """Appendix C, written down as it stands there; ties go to the first name."""
    stale, chosen = {}, []
    for t in range(steps):
        if t == 0 or (every and t % every == 0):
            stale = {name: weights[name] * (loss(name, t) - optima[name]) for name in sorted(weights) if weights[name] > 0}
        i = max(stale, key=lambda name: stale[name])
        stale[i] = weights[i] * (loss(i, t) - optima[i])
        chosen.append(i)
    return chosen, stale


@given(weightings(zero=True), st.sampled_from([1, 2, 3, 7, 10, None, -1]), st.integers(0, 50), st.floats(-3, 3))
def test_largest_gap_by_the_definition_and_by_stale_values_between(weights, every, seed, shift):
    """Equations (16)-(19). Optima may lie above the losses, which makes the gaps negative."""
    optima = {name: shift * k for k, name in enumerate(weights)}
    wandering = Wandering(weights, seed)
    objective = MaxGapObjective(weights, optima=optima, evaluate_every=every)
    said = wandering.run(objective, 25)
    loss = lambda name, t: wandering.x[name].item() * wandering.value(name, t)  # noqa: E731
    chosen, stale = reference(weights, optima, None if every == -1 else every, loss, 25)
    assert [name for name, _ in said] == chosen
    assert [x for _, x in said] == [loss(name, t) for t, name in enumerate(chosen)]
    assert objective.gaps == stale


@given(weightings(), st.integers(0, 50))
def test_evaluating_at_every_step_is_algorithm_3(weights, seed):
    wandering, twin = Wandering(weights, seed), Wandering(weights, seed)
    objective = MaxGapObjective(weights, optima=dict.fromkeys(weights, 0.1), evaluate_every=1)
    for _ in range(15):
        with torch.no_grad():
            gaps = {name: weights[name] * (f().item() - 0.1) for name, f in twin.closures().items()}
        twin.step += 1
        wandering.run(objective, 1)
        assert gaps[objective.chosen] == max(gaps.values())


def test_ties_go_to_the_first_name():
    even = {"sft": lambda: torch.tensor(1.0), "preference": lambda: torch.tensor(1.0)}
    objective = MaxGapObjective({"sft": 0.5, "preference": 0.5})
    assert [objective(even).item() and objective.chosen for _ in range(3)] == ["preference"] * 3


def test_no_optima_are_zeros():
    weights = {"sft": 0.4, "preference": 0.6}
    zeros = MaxGapObjective(weights, optima={"sft": 0, "preference": 0})
    assert Wandering(weights).run(MaxGapObjective(weights), 20) == Wandering(weights).run(zeros, 20)


# ---- what every schedule keeps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(weights=weightings(zero=True), seed=st.integers(0, 20), order=st.permutations(range(3)))
def test_the_order_of_names_changes_nothing(kind, weights, seed, order):
    """But for the phases of SequentialObjective, whose order is the schedule: there the order of closures changes nothing."""
    names = list(weights)
    turned = {names[i]: weights[names[i]] for i in order if i < len(names)}
    one, other = make(kind, weights, seed), make(kind, weights if kind == "sequential" else turned, seed)
    assert Wandering(weights, seed).run(one, 12) == Wandering(turned, seed).run(other, 12)
    assert one.state_dict() == other.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_weight_runs_no_closure(kind):
    weights = {"sft": 0.0, "preference": 0.4, "retain": 0.6}
    wandering = Wandering(weights)
    objective = make(kind, weights)
    wandering.run(objective, 12)
    assert wandering.graphs["sft"] == wandering.plain["sft"] == 0
    assert all(wandering.graphs[name] > 0 for name in objective.active)
    Wandering(objective.active).run(objective, 3)  # its closure may be left out


@pytest.mark.parametrize(
    ("kind", "graphs", "plain"),
    [
        ("mixed", 36, 0),
        ("alternating", 12, 0),
        ("sequential", 12, 0),
        ("max_gap", 12, 36),
        ("max_gap_3", 12, 12),
        ("max_gap_once", 12, 3),
    ],
)
def test_forwards_of_twelve_steps_on_three_objectives(kind, graphs, plain):
    weights = {"sft": 0.3, "preference": 0.3, "retain": 0.4}
    wandering = Wandering(weights)
    wandering.run(make(kind, weights), 12)
    assert (sum(wandering.graphs.values()), sum(wandering.plain.values())) == (graphs, plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [0, 1, 5, 12])
def test_a_resumed_run_repeats_the_schedule_bit_for_bit(kind, stop):
    weights = {"sft": 0.3, "preference": 0.3, "retain": 0.4}
    whole, first = Wandering(weights), Wandering(weights)
    objective = make(kind, weights, seed=4)
    said = whole.run(objective, 30)
    halted = make(kind, weights, seed=4)
    begun = first.run(halted, stop)
    kept = json.loads(json.dumps(halted.state_dict()))
    resumed = make(kind, weights, seed=4)
    resumed.load_state_dict(kept)
    assert (resumed.chosen, resumed.step, resumed.gaps) == (halted.chosen, halted.step, halted.gaps)
    assert begun + first.run(resumed, 30 - stop) == said
    assert resumed.state_dict() == objective.state_dict()


def test_sequential_phases_run_in_their_order_and_the_last_goes_on():
    objective = SequentialObjective({"sft": 2, "none": 0, "preference": 3, "never": 0})
    assert [objective.choose() for _ in range(9)] == ["sft"] * 2 + ["preference"] * 7
    assert objective.weights == {"sft": 0.4, "preference": 0.6, "none": 0.0, "never": 0.0}


# ---- steps that are more than one loss -----------------------------------------------------------------------------------


def test_choose_and_observe_are_what_a_call_does():
    weights = {"sft": 0.3, "preference": 0.3, "retain": 0.4}
    for kind in ("alternating", "sequential", "max_gap", "max_gap_3", "max_gap_once"):
        one, other = Wandering(weights), Wandering(weights)
        called, spelled = make(kind, weights), make(kind, weights)
        for _ in range(12):
            one.run(called, 1)
            closures = other.closures()
            name = spelled.choose(closures)
            spelled.observe(name, closures[name]().item() if kind == "max_gap_3" else closures[name]())
            other.step += 1
            assert (called.chosen, called.state_dict()) == (spelled.chosen, spelled.state_dict())


@pytest.mark.parametrize("kind", ["alternating", "sequential", "max_gap_3"])
def test_orthogonal_descent_takes_turns_with_fine_tuning(kind):
    """An OGD slot beside SFT: each step is bit for bit the step that the chosen one makes alone."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3).double()
    x = {name: torch.randn(7, 5).double() for name in ("winner", "loser", "sft")}
    objective = make(kind, {"preference": 0.5, "sft": 0.5})

    def closures(m):
        return {name: lambda v=v: m(v).logsumexp(-1).square().mean() for name, v in x.items()}

    def optimizer(m):
        return ProjectedGradient(torch.optim.SGD(m.parameters(), lr=0.05), max_norm=1.0)

    opt, seen = optimizer(model), []
    mine = closures(model)
    for _ in range(12):
        twin = copy.deepcopy(model)
        theirs, other = closures(twin), optimizer(twin)
        name = objective.choose({"preference": mine["winner"], "sft": mine["sft"]})
        if name == "preference":
            report, expected = opt.step(mine["winner"], mine["loser"]), other.step(theirs["winner"], theirs["loser"])
        else:
            report, expected = opt.step(mine["sft"]), other.step(theirs["sft"])
        objective.observe(name, report.winner_loss)
        seen.append(name)
        assert report.winner_loss == expected.winner_loss and (report.loser_loss is None) == (name == "sft")
        assert torch.equal(model.weight, twin.weight)
        if kind == "max_gap_3":
            assert objective.gaps[name] == 0.5 * report.winner_loss
    assert set(seen) == {"preference", "sft"}


def test_an_exception_in_an_evaluation_leaves_the_schedule_as_it_was():
    weights = {"sft": 0.5, "preference": 0.5}
    objective = MaxGapObjective(weights, evaluate_every=2)
    Wandering(weights).run(objective, 4)
    before = objective.state_dict()
    with pytest.raises(ZeroDivisionError):
        objective({"sft": lambda: 1 / 0, "preference": lambda: torch.tensor(9.0)})
    assert objective.state_dict() == before


# ---- numbers that are not finite, and misuse -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_keeps_the_last_known_gap(value):
    objective = MaxGapObjective({"a": 0.5, "b": 0.5}, evaluate_every=2)
    at = [{"a": 4.0, "b": 1.0}, {"a": value, "b": 1.0}, {"a": value, "b": 6.0}]
    for losses, chosen, gaps in zip(at, "aab", ({"a": 2, "b": 0.5}, {"a": 2, "b": 0.5}, {"a": 2, "b": 3})):
        objective({name: lambda x=x: torch.tensor(x) for name, x in losses.items()})
        assert (objective.chosen, objective.gaps) == (chosen, gaps)
    with pytest.raises(ValueError, match=r"first losses of \['b'\] are not finite"):
        MaxGapObjective({"a": 0.5, "b": 0.5})({"a": lambda: torch.tensor(1.0), "b": lambda: torch.tensor(value)})


HALVES = {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: MixedObjective({}), "at least one"),
        (lambda: MixedObjective({1: 1.0}), "at least one"),
        (lambda: AlternatingObjective({"a": 1.5, "b": -0.5}), r"\{'b': -0.5\} are out of range"),
        (lambda: AlternatingObjective({"a": math.nan, "b": 1.0}), "out of range"),
        (lambda: MixedObjective({"a": 0.5, "b": 0.4}), "sum to 0.9; expected 1: divide each by 0.9"),
        (lambda: AlternatingObjective(HALVES, seed=0.5), "seed is 0.5"),
        (lambda: SequentialObjective({"a": 0, "b": 0}), "not all of them 0"),
        (lambda: SequentialObjective({"a": 3, "b": -1}), "whole numbers"),
        (lambda: SequentialObjective({"a": 0.5, "b": 0.5}), "whole numbers"),
        (lambda: SequentialObjective({}), "not all of them 0"),
        (lambda: MaxGapObjective(HALVES, optima={"a": 0.0}), r"\['b'\] missing"),
        (lambda: MaxGapObjective(HALVES, optima={"a": 0.0, "b": 0.0, "c": 0.0}), r"\['c'\] unknown"),
        (lambda: MaxGapObjective(HALVES, optima={"a": math.nan, "b": 0.0}), "not finite"),
        (lambda: MaxGapObjective(HALVES, evaluate_every=0), "evaluate_every is 0"),
        (lambda: MaxGapObjective(HALVES, evaluate_every=2.5), "evaluate_every is 2.5"),
        (lambda: MaxGapObjective(HALVES, evaluate_every=-2), "evaluate_every is -2"),
        (lambda: MaxGapObjective(HALVES).choose(), r"step 0 evaluates all objectives; expected choose\("),
        (lambda: AlternatingObjective(HALVES).observe("c", 1.0), "a loss of 'c' was observed"),
        (lambda: MaxGapObjective({"a": 1, "b": 0}).observe("b", 1.0), r"a loss of 'b' was observed; expected one of \['a'\]"),
        (lambda: MaxGapObjective(HALVES).observe("a", None), "the loss of 'a' is None"),
    ],
)
def test_misuse_is_refused_with_what_was_found_and_expected(build, words):
    with pytest.raises(ValueError, match=words):
        build()


@pytest.mark.parametrize("kind", KINDS)
def test_closures_must_be_those_of_the_objectives_and_return_one_number(kind):
    one = lambda: torch.tensor(1.0)  # noqa: E731
    for closures, words in (
        ({"a": one}, r"\['b'\] missing"),
        ({"a": one, "b": one, "c": one}, r"\['c'\] unknown"),
        ({"a": lambda: torch.ones(3), "b": lambda: torch.ones(3)}, r"tensor of shape \(3,\); expected a tensor of shape \(\)"),
        ({"a": lambda: None, "b": lambda: None}, "is None; expected a tensor"),
    ):
        objective = make(kind, HALVES)
        with pytest.raises(ValueError, match=words):
            objective(closures)


def test_a_state_of_another_schedule_is_refused_and_changes_nothing():
    objective = AlternatingObjective(HALVES)
    for state, words in (
        (AlternatingObjective({"a": 0.5, "c": 0.5}).state_dict(), r"names is \['a', 'c'\], this objective's \['a', 'b'\]"),
        (MixedObjective(HALVES).state_dict(), "schedule is 'MixedObjective'"),
        ({"step": 3}, r"lacks \['chosen', 'names', 'schedule'\]"),
    ):
        with pytest.raises(ValueError, match=words):
            objective.load_state_dict(state)
        assert objective.step == 0
    other = MaxGapObjective(HALVES)
    with pytest.raises(ValueError, match=r"lacks \['losses'\]"):
        other.load_state_dict({k: v for k, v in other.state_dict().items() if k != "losses"} | {"step": 3})
    assert other.step == 0


# ---- ranks ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks with losses of their own wrote."""
    folder = tmp_path_factory.mktemp("objectives")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", worker.__file__, str(folder)]
    done = subprocess.run(
        words,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=limits.PROCESS,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("every", [1, 4, None])
def test_ranks_choose_alike_by_the_mean_of_their_losses(ranks, every):
    mine, other = (table[f"max_gap_{every}"] for table in ranks)
    assert mine == other
    means = {t: worker.means(t) for t in range(worker.STEPS)}
    chosen, stale = reference(worker.WEIGHTS, worker.OPTIMA, every, lambda name, t: means[t][name].item(), worker.STEPS)
    assert mine["chosen"] == chosen and mine["gaps"] == pytest.approx(stale, rel=1e-12)


def test_ranks_draw_alike_and_as_one_process_does(ranks):
    objective = AlternatingObjective(worker.WEIGHTS, seed=3)
    chosen = [objective.choose() for _ in range(worker.STEPS)]
    assert ranks[0]["alternating"]["chosen"] == ranks[1]["alternating"]["chosen"] == chosen


def test_ranks_that_train_models_of_their_own_choose_for_themselves(ranks):
    assert ranks[0]["alone"]["chosen"] != ranks[1]["alone"]["chosen"]  # the losses differ enough for the other tests to tell


def test_losses_of_tensor_parallel_models(ranks):
    assert ranks[0]["tensor_parallel"] == ranks[1]["tensor_parallel"]
    assert ranks[0]["tensor_parallel"]["chosen"] == ranks[0]["max_gap_4"]["chosen"]


def test_one_rank_that_is_not_finite_is_heard_by_all(ranks):
    assert ranks[0]["spoiled"] == ranks[1]["spoiled"]
    assert all(math.isfinite(gap) for gap in ranks[0]["spoiled"]["gaps"].values())
    assert "first losses of ['b'] are not finite" in ranks[0]["spoiled_first"] == ranks[1]["spoiled_first"]


def test_one_message_a_step_and_one_an_evaluation(ranks):
    """Five steps, evaluations at 0 and 3: the losses of all three objectives twice, the chosen one's five times."""
    assert ranks[0]["messages"] == {"3": 2, "1": 5}
