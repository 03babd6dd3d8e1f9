"""Pairs and supervised rows in one run: whose step it is, which rows it takes, which gradient, what is logged and refused."""

import json

import pytest
import torch

from harness.config import Config, PreferenceConfig
from harness.data import Preferences, collate
from harness.methods import runs
from harness.model import completion_logps
from harness.stages import SeedStudy
from harness.train import Job, Trainer
from ogdopt.losses import Pairs, dpo
from tests import small
from tests.test_train import JOINT, job, lines, run


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return small.tokenizer(tmp_path_factory.mktemp("tok"))


@pytest.fixture
def steps(monkeypatch):
    """What was trained on, step by step: (stream, rows)."""
    found = []
    collect = Trainer._collect_stream

    def noted(self, name, indices, *args):
        found.append((name, indices))
        return collect(self, name, indices, *args)

    monkeypatch.setattr(Trainer, "_collect_stream", noted)
    return found


def test_runs_of_a_study():
    found = runs(["dpo", "mix", "alright"], [0.2, 0.1], [0.25, 0.5])
    assert [(r.name, r.label, r.beta, r.weight) for r in found] == [
        ("dpo_beta0.2", "DPO β=0.2", 0.2, None),
        ("dpo_beta0.1", "DPO β=0.1", 0.1, None),
        ("mix_lambda0.25", "Mix λ=0.25", None, 0.25),
        ("mix_lambda0.5", "Mix λ=0.5", None, 0.5),
        ("alright_lambda0.25", "ALRIGHT λ=0.25", None, 0.25),
        ("alright_lambda0.5", "ALRIGHT λ=0.5", None, 0.5),
    ]
    assert [r.label for r in runs(["maxright", "sequential"], [])] == ["MAXRIGHT λ=0.5", "Sequential λ=0.5"]


@pytest.mark.parametrize("lambdas", [[], [0.5, 0.5], [1.5], [-0.1], [float("nan")]])
def test_lambdas_out_of_range(lambdas):
    assert len(runs(["dpo"], [0.1], lambdas)) == 1
    with pytest.raises(ValueError, match=r"preference.lambdas is .*; expected one or more different numbers from 0 to 1"):
        runs(["alright"], [0.1], lambdas)


def test_the_first_step_of_mix_is_the_weighted_gradient(tok, tmp_path):
    """Against autograd: lambda g_dpo + (1 - lambda) g_sft, in micro-batches of unequal numbers on the two sides."""
    options = {"optimizer": "SGD", "learning_rate": 1.0, "warmup_steps": 0, "max_grad_norm": None}
    model, expected = small.model(tok), small.model(tok)
    task = job(tmp_path, tok, "mix", joint={"batch_size": 6}, per_device_train_batch_size=2, **options)
    trainer = Trainer(task, model, tok, torch.device("cpu"), False)
    trainer.reference = trainer._reference()
    batches = {name: plan.rows(0)[0] for name, plan in trainer.streams.items()}
    assert {name: len(rows) for name, rows in batches.items()} == {"preference": 4, "sft": 6}

    def scored(examples, indices):
        return completion_logps(expected, *collate([examples[i] for i in indices], tok.pad_token_id))

    chosen, rejected = (scored(side, batches["preference"]) for side in (task.data.winners, task.data.losers))
    f_dpo = dpo(Pairs(chosen, rejected, chosen.logp.detach(), rejected.logp.detach()), beta=0.5).mean()
    assert task.joint is not None
    f_sft = -scored(task.joint.supervised, batches["sft"]).logp.mean()
    (0.7 * f_dpo + 0.3 * f_sft).backward()
    step = torch.cat([p.grad.flatten() for p in expected.parameters()])
    line = trainer._step(0)
    torch.testing.assert_close(small.vector(expected) - small.vector(model), step, rtol=1e-4, atol=1e-5)
    assert line["objective/preference"] == pytest.approx(f_dpo.item(), rel=1e-5)
    assert line["objective/sft"] == pytest.approx(f_sft.item(), rel=1e-5)
    assert line["loss"] == pytest.approx(0.7 * f_dpo.item() + 0.3 * f_sft.item(), rel=1e-5)


def test_mix_takes_both_streams_at_every_step(tok, tmp_path, steps):
    run(tmp_path, tok, "mix")
    _, *found = lines(tmp_path)
    assert [name for name, _ in steps] == ["preference", "sft"] * 6
    for line in found:
        assert line["loss"] == pytest.approx(0.7 * line["objective/preference"] + 0.3 * line["objective/sft"], rel=1e-5)
        assert {"logps/chosen", "rewards/margins", "grad_norm"} <= line.keys()
        assert "objective/chosen" not in line


@pytest.mark.parametrize("method", ["alright", "maxright", "sequential"])
def test_every_step_is_of_the_stream_that_is_logged(method, tok, tmp_path, steps):
    """And each stream goes through its own rows without gaps, whatever the other one does."""
    run(tmp_path, tok, method, num_train_epochs=5)
    _, *found = lines(tmp_path)
    chosen = ["preference" if line["objective/chosen"] == 1 else "sft" for line in found]
    assert chosen == [name for name, _ in steps] and len(chosen) == 15
    assert min(chosen.count("preference"), chosen.count("sft")) >= 3
    plans = job(tmp_path, tok, method).streams
    for stream, plan in plans.items():
        taken = [rows for name, rows in steps if name == stream]
        assert taken == [plan.rows(k)[0] for k in range(len(taken))]
    assert sorted(i for k in range(2) for i in plans["sft"].rows(k)[0]) == list(range(7))
    for line, name in zip(found, chosen):
        assert line["loss"] == line[f"objective/{name}"]
        assert ("logps/chosen" in line) == ("rewards/margins" in line) == (name == "preference")
    (*_, last) = sorted((tmp_path / "checkpoint").glob("step-*"))
    state = json.loads((last / "state.json").read_text())["schedule"]
    assert state["taken"] == {name: chosen.count(name) for name in ("preference", "sft")}
    assert state["objective"]["step"] == 15


def test_maxright_steps_on_the_largest_gap(tok, tmp_path):
    run(tmp_path, tok, "maxright", num_train_epochs=5)
    _, *found = lines(tmp_path)
    for line in found:
        gaps = {name: line[f"objective/gap_{name}"] for name in ("preference", "sft")}
        assert line["objective/chosen"] == (gaps["preference"] >= gaps["sft"])
        if {"objective/preference", "objective/sft"} <= line.keys():
            assert gaps["preference"] == pytest.approx(0.7 * line["objective/preference"], rel=1e-4)
            assert gaps["sft"] == pytest.approx(0.3 * (line["objective/sft"] - 12.0), rel=1e-4)
    assert {line["objective/chosen"] for line in found} == {0.0, 1.0}
    evaluated = [line["step"] for line in found if {"objective/preference", "objective/sft"} <= line.keys()]
    assert evaluated == [1, 4, 7, 10, 13]


def test_sequential_does_the_pairs_first(tok, tmp_path):
    run(tmp_path, tok, "sequential", num_train_epochs=5, joint={"weight": 0.4})
    assert [line["objective/chosen"] for line in lines(tmp_path)[1:]] == [1.0] * 6 + [0.0] * 9


def test_all_the_weight_on_the_pairs_is_dpo(tok, tmp_path):
    dpo_alone = small.vector(run(tmp_path / "dpo", tok, "dpo"))
    for method in JOINT:
        assert torch.equal(small.vector(run(tmp_path / method, tok, method, joint={"weight": 1.0})), dpo_alone)


@pytest.mark.parametrize("method", JOINT)
def test_without_supervised_rows_or_pairs(method, tok, tmp_path):
    data = small.preferences(tok)
    with pytest.raises(ValueError, match=f"'{method}' trains on supervised rows beside the pairs, and there are none"):
        Job(tmp_path, "x", "x", method, small.stage(), data, None, beta=0.1)
    with pytest.raises(ValueError, match=f"'{method}' compares two answers to one prompt, but .* unpaired"):
        job(tmp_path, tok, method, data=Preferences(data.winners, data.losers[:5], paired=False))


def test_a_study_without_supervised_rows_ends_before_it_starts():
    with pytest.raises(ValueError, match=r"alright trains on the supervised rows .*, but sft.data.train is empty; expected"):
        SeedStudy(Config(methods=["dpo", "alright"], device="cpu"), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"joint_beta": 0.0}, r"preference.joint_beta is 0.0; expected a positive number"),
        ({"optima": {"sft": 1.0}}, r"preference.optima is \{'sft': 1.0\}; expected \{preference: x, sft: y\}"),
        ({"evaluate_every": 0}, r"preference.evaluate_every is 0; expected 1 or more steps, or -1"),
        ({"sft_batch_size": 96}, r"preference.sft_batch_size is 96; expected a multiple of per_device.* \(64\), or null"),
        ({"train_batch_size": 96}, r"train_batch_size is 96; expected a multiple"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        PreferenceConfig(**options)
    assert PreferenceConfig(evaluate_every=-1, sft_batch_size=128, optima={"preference": 0.0, "sft": 1.0}).joint_beta == 0.1
