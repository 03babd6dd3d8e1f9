"""Learning dynamics (SPEC 5): gradients and theorems of the unembedding, measures of embeddings, the study on short runs."""

import gzip
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ogdopt.dynamics import means, priority, separation
from ogdopt.losses import Completion, Pairs, dpo
from ogdopt_harness.analysis import claims
from ogdopt_harness.data.behaviours import QUESTION, Behaviour, made_up, read_behaviours
from ogdopt_harness.modeling.embeddings import embed, flat
from ogdopt_harness.studies import behaviour_lab, dynamics
from ogdopt_harness.studies.dynamics import alone, boundary, certain, direction, drawn, priorities, tuned
from tests import small

PERSONA = Path(__file__).resolve().parents[2] / "shared" / "data" / "persona"


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return small.tokenizer(tmp_path_factory.mktemp("tok"))


def behaviour(seed, size=2.0, d=16, n=20, noise=0.5):
    generator = torch.Generator().manual_seed(seed)
    return drawn(size * direction(d, generator), n, noise, generator)


# ---- the unembedding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_two_rows_are_the_whole_dpo_step(seed):
    """Autograd of the library's loss through an unembedding of seven tokens: rows 2 (Yes) and 5 (No) alone move."""
    c, beta, rate = behaviour(seed), 0.3, 0.7
    g = torch.cat([c.positive, c.negative])
    start = torch.randn(7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 10))
    W = start.clone().requires_grad_()
    preferred = torch.tensor([2] * 10 + [5] * 10)
    other = 7 - preferred
    reference = (g @ start.T).log_softmax(-1)
    course = alone(c, beta, rate, 5)
    for t in range(5):
        logps = (g @ W.T).log_softmax(-1)
        sides = [Completion(logps.gather(1, y[:, None]), torch.ones(20, 1)) for y in (preferred, other)]
        refs = [reference.gather(1, y[:, None])[:, 0] for y in (preferred, other)]
        loss = dpo(Pairs(*sides, *refs), beta=beta).mean()
        assert loss.item() == pytest.approx(course.loss[t].item(), rel=1e-12)
        (gradient,) = torch.autograd.grad(loss, W)
        if t == 0:
            assert gradient.norm().item() == pytest.approx(math.sqrt(2) / 4 * beta * c.gap.norm().item(), rel=1e-12)
        W = (W - rate * gradient).detach().requires_grad_()
        change = W.detach() - start
        torch.testing.assert_close(change[2], course.change[t + 1], rtol=0, atol=1e-14)
        torch.testing.assert_close(change[5], -course.change[t + 1], rtol=0, atol=1e-14)
        assert change[[0, 1, 3, 4, 6]].abs().max() < 1e-15
        assert course.length[t + 1].item() == pytest.approx(torch.linalg.matrix_norm(change, 2).item(), rel=1e-9)


@given(st.integers(0, 10_000), st.floats(0.01, 5), st.floats(0.05, 3), st.integers(2, 40))
def test_theorem_4_1_in_its_sharper_form(seed, size, noise, n):
    """|W(t) - W(0)| <= sqrt(2)/4 beta eta t |mu+ - mu-| of the sample, wherever eta L <= 2: no other condition."""
    c = behaviour(seed, size, n=2 * n, noise=noise)
    beta = 0.5
    longest = torch.cat([c.positive, c.negative]).norm(dim=1).max().item()
    rate = 1 / (beta * longest) ** 2  # L <= beta^2 max |g|^2, with both rows
    course = alone(c, beta, rate, 40)
    t = torch.arange(41, dtype=torch.float64)
    assert (course.length <= math.sqrt(2) / 4 * beta * rate * t * c.gap.norm() * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("phi", [0.0, 0.5])
def test_theorem_4_2_on_its_event_and_4_3_out_of_reach(phi):
    found = boundary(0, phi=phi)
    assert found["event"] == 1 and found["slack"] > 0 and found["vacuous"] > 1


@given(st.integers(0, 10_000), st.floats(0.1, 10))
def test_a_margin_of_inequality_36_is_enough(seed, size):
    c = behaviour(seed, size)
    row = alone(c, 0.1, 1.0, 10).change[-1]
    covered, wrong = certain(c, row)
    assert wrong == 0 and 0 <= covered <= 20
    assert certain(behaviour(seed, 50.0, noise=0.01), behaviour(seed, 50.0, noise=0.01).difference) == (20, 0)


def test_priority_is_what_the_first_step_does():
    """Ratio 1 for the mean margins, and the pair's identity P_1 - P_2 = (|b_1|^2 - |b_2|^2)/(2 |b| |b*|)."""
    assert priorities(0, count=3)["first_step"] < 1e-12
    one, other = (behaviour(k, size).gap for k, size in ((1, 1.0), (2, 3.0)))
    levels, mean = priority(torch.stack([one, other])), (one + other) / 2
    expected = (one @ one - other @ other) / (2 * mean.norm() * other.norm())
    assert (levels[0] - levels[1]).item() == pytest.approx(expected.item(), rel=1e-12)
    with pytest.raises(ValueError, match="add up to zero"):
        priority(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))


def test_what_lies_further_apart_is_learned_first():
    losses = tuned([behaviour(k, size, d=64, n=100, noise=0.1) for k, size in enumerate((0.5, 2.0, 8.0))], 0.05, 1.0, 50)[1][-1]
    assert losses[0] > losses[1] > losses[2]


# ---- measures ------------------------------------------------------------------------------------------------------------


def test_separation_by_hand():
    positive, negative = torch.tensor([[3.0, 0.0], [5.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    found = separation(positive, negative, boundary=torch.tensor([0.0, -2.0]))
    assert means(positive, negative).tolist() == [4.0, -2.0]
    assert found["dynamics/distinguishability"] == pytest.approx(20**0.5)
    assert found["dynamics/concentration"] == pytest.approx(4.0) == found["dynamics/trace"]
    assert found["dynamics/spread"] == pytest.approx(0.2)
    assert found["dynamics/boundary_cosine"] == pytest.approx(1 / 5**0.5)
    with pytest.raises(ValueError, match=r"negative has shape \(2,\); expected one embedding a row, \(n, 2\)"):
        separation(positive, torch.ones(2))


@given(st.integers(0, 1000), st.integers(2, 12), st.integers(2, 12))
def test_concentration_is_the_norm_of_the_covariance(seed, n, d):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    covariance = torch.cov(x.T, correction=0)
    found = separation(x, x + 1)
    assert found["dynamics/concentration"] == pytest.approx(torch.linalg.matrix_norm(covariance, 2).item(), rel=1e-9)
    assert found["dynamics/trace"] == pytest.approx(covariance.trace().item(), rel=1e-9)


def test_embeddings_are_what_the_unembedding_reads(tok):
    """The head on them gives the model's logits: the final norm is there once, and padding changes nothing."""
    model = small.model(tok)
    model.model.norm.weight.data.copy_(torch.linspace(0.5, 2, 16))  # with equal weights a second norm changes nothing
    prompts = [[5, 9, 12, 7], [6, 8], [11]]
    found = embed(model, prompts, batch_size=2)
    for ids, hidden in zip(prompts, found):
        logits = model(torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(model.get_output_embeddings()(hidden), logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model.get_output_embeddings()(model.model.norm(hidden)), logits, atol=1e-3)


def test_the_picture_is_of_the_two_main_axes_or_of_umap(monkeypatch):
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 3.0, 0.1, 0.1, 0.1])
    points, method = flat(x)
    if method == "PCA":
        variances = np.linalg.eigvalsh(np.cov(x.double().numpy().T, ddof=0))[::-1][:2]
        np.testing.assert_allclose(points.var(0), variances, rtol=1e-9)
    fake = types.ModuleType("umap")
    fake.__spec__ = types.SimpleNamespace()
    fake.UMAP = lambda random_state: types.SimpleNamespace(fit_transform=lambda y: y[:, :2] + random_state)
    monkeypatch.setitem(sys.modules, "umap", fake)
    points, method = flat(x)
    assert method == "UMAP" and np.allclose(points, x[:, :2].numpy() + 1234)


# ---- statements ----------------------------------------------------------------------------------------------------------


def row(question="a?", answer=" Yes", **more):
    return json.dumps({"question": question, "answer_matching_behavior": answer} | more) + "\n"


def test_behaviours_of_files_and_folders(tmp_path):
    (tmp_path / "kind.jsonl").write_text(row("a?") + row("b?", " No"))
    with gzip.open(tmp_path / "many.jsonl.gz", "wt") as file:
        file.write(row("c?", behavior="odd") + row("d?", behavior="even"))
    assert read_behaviours(tmp_path) == {
        "even": Behaviour("even", ["d?"], []),
        "kind": Behaviour("kind", ["a?"], ["b?"]),
        "odd": Behaviour("odd", ["c?"], []),
    }


@pytest.mark.parametrize("line", [row(answer="Yes"), row(question=3), "[1]\n", "{\n"])
def test_a_row_that_is_no_statement_is_named(line, tmp_path):
    (tmp_path / "x.jsonl").write_text(row() + line)
    with pytest.raises(ValueError, match=r"x\.jsonl:2"):
        read_behaviours(tmp_path)


def test_real_statements_are_read_as_they_are():
    if not PERSONA.is_dir():
        pytest.skip(f"no persona statements in {PERSONA}")
    found = read_behaviours(PERSONA)
    assert len(found) == 40 and set(dynamics.PAPERS) <= set(found)
    start = QUESTION.partition("{")[0]
    for b in found.values():
        assert min(len(b.positive), len(b.negative)) > 300 and all(q.startswith(start) for q in b.positive)


def test_made_up_behaviours_are_told_apart_by_their_strength():
    found = list(made_up((0.0, 1.0), 40).values())
    assert made_up((0.0, 1.0), 40) == made_up((0.0, 1.0), 40)
    shared = [{w for q in b.positive for w in q.split()} & {w for q in b.negative for w in q.split()} for b in found]
    assert len(shared[0]) > len(shared[1]) and all(len(b.positive) == len(b.negative) == 20 for b in found)


# ---- the study -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    for name, value in {"USED": 30, "HELD_OUT": 6, "TEXT_STEPS": 4, "STEPS": 10}.items():
        monkeypatch.setattr(behaviour_lab, name, value)
    monkeypatch.setattr(dynamics, "USED", 30)


def test_one_batch_of_the_small_model_is_the_librarys_dpo(short, tmp_path):
    """Loss and OGD's two likelihoods against log-softmax over the whole vocabulary."""
    lab = behaviour_lab.Lab(list(made_up((0.3, 0.6), 60).values()), 0, tmp_path)
    task, rows = lab.train[0], [0, 5, 7]
    before = lab.margins(lab.model, task.questions)
    batch = behaviour_lab.Batch(task, rows, task.sign, before + 0.5, lab.answers)
    logps = torch.stack([lab.model(task.questions[k][None]).logits[0, -1].log_softmax(-1) for k in rows])
    yes_first = torch.where(task.sign[rows] > 0, 0, 1)
    chosen, rejected = (logps.gather(1, lab.answers[k][:, None]) for k in (yes_first, 1 - yes_first))
    zero = torch.zeros(3)
    shift = (before[rows] + 0.5) * task.sign[rows]
    pairs = Pairs(Completion(chosen, torch.ones(3, 1)), Completion(rejected, torch.ones(3, 1)), shift, zero)
    assert batch.dpo(lab.model).item() == pytest.approx(dpo(pairs, beta=behaviour_lab.BETA).mean().item(), rel=1e-4)
    assert batch.likelihood(lab.model, True).item() == pytest.approx(-chosen.mean().item(), rel=1e-4)
    assert batch.likelihood(lab.model, False).item() == pytest.approx(-rejected.mean().item(), rel=1e-4)


def test_flipped_labels_undo_and_ogd_takes_part(short):
    found = behaviour_lab.fine_tuning(list(made_up((0.0, 0.9), 60).values()), 0)
    assert found == found | {"names": ["music", "sport"]} and len(found["losses"][0]) == 10
    assert found["losses"][0][0] == pytest.approx(math.log(2), abs=1e-6)
    (least, most) = found["flips"].values()
    for f in (least, most):
        assert set(f["flipped"]) == {"base", "DPO", "OGD"}
        assert all(run["losses"][0] == pytest.approx(math.log(2), abs=1e-5) for run in f["flipped"].values())
    assert most["flipped"]["DPO"]["margins"][-1] < most["aligned"]["DPO"]["margin"]


def test_the_study_on_given_statements(short, tmp_path, monkeypatch):
    rows = [row(q, answer, behavior=b.name) for b in made_up((0.1, 0.3, 0.5, 0.7, 0.9), 60).values()
            for side, answer in ((b.positive, " Yes"), (b.negative, " No")) for q in side]  # fmt: skip
    (tmp_path / "mine.jsonl").write_text("".join(rows))
    monkeypatch.setattr(dynamics, "boundary", lambda seed, phi: {"event": 1.0, "slack": 0.1, "vacuous": 2.0})
    monkeypatch.setattr(dynamics, "COUNT", 40)
    found = dynamics.study([7], data_dir=str(tmp_path / "mine.jsonl"))
    claims.write(tmp_path / "out", "dynamics", "Dynamics", found, {})
    page = (tmp_path / "out" / "study.md").read_text()
    assert "Theorem 4.3 as printed is vacuous" in page and "5 behaviours" in page and "1 of 1 (too few" in page
    assert len(list((tmp_path / "out").glob("*.svg"))) == 5
    with pytest.raises(ValueError, match=r"0 of 1 behaviours in .* have 30 questions"):
        (tmp_path / "few.jsonl").write_text(row())
        dynamics.study([7], data_dir=str(tmp_path / "few.jsonl"))


def test_without_a_folder_data_are_generated_wherever_the_package_lies():
    behaviours, source = dynamics._behaviours(None)
    assert source == "generated" and len(behaviours) == len(dynamics.MADE_UP)
    assert not {b.name for b in behaviours} & set(dynamics.PAPERS)
