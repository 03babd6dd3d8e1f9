"""The loop: gradients by definition, accumulation, resume, what is measured, what is refused."""

import dataclasses
import json
import math
import os
import signal

import pytest
import torch

from ogdopt.losses import LOSSES, Pairs
from ogdopt_harness.data.examples import Preferences, collate
from ogdopt_harness.modeling.score import completion_logps
from ogdopt_harness.modeling.shard import prepare
from ogdopt_harness.training.gradients import GradientSource
from ogdopt_harness.training.job import Job, Plan
from ogdopt_harness.training.joint import Joint
from ogdopt_harness.training.methods import METHODS, runs
from ogdopt_harness.training.progress import Stopped
from ogdopt_harness.training.trainer import Trainer, train
from tests import small
from tests.gradients import reference


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return small.tokenizer(tmp_path_factory.mktemp("tok"))


JOINT = [name for name, method in METHODS.items() if method.schedule]
OPTIONS = {"weight": 0.7, "batch_size": 4, "optima": {"preference": 0.0, "sft": 12.0}, "evaluate_every": 3}


CPU = torch.device("cpu")


def job(folder, tok, method="ogd", data=None, joint=None, **changes):
    data = data or small.preferences(tok)
    beta = 0.5 if METHODS[method].beta or method in JOINT else None
    held_out = small.preferences(tok, seed=5)
    streams = Joint(small.preferences(tok, n=7, seed=3).losers, **(OPTIONS | (joint or {}))) if method in JOINT else None
    return Job(folder, method, method, small.stage(**changes), data, held_out, beta=beta, joint=streams)


def run(folder, tok, method="ogd", seed=0, **changes):
    model = prepare(small.model(tok, seed), small.MODEL, torch.device("cpu"))
    train(job(folder, tok, method, **changes), model, tok, torch.device("cpu"))
    return model


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_padding_and_speed_are_those_of_the_step(tok, tmp_path, monkeypatch):
    """Both sides, each sorted by length and cut into pairs: what stands in the log against a count by hand."""
    trainer = Trainer(job(tmp_path, tok, per_device_train_batch_size=2), small.model(tok), tok, torch.device("cpu"), False)
    winners, losers = trainer.plan.rows(0)
    rows, tokens, places = small.preferences(tok), 0, 0
    for side in ([rows.winners[i] for i in winners], [rows.losers[i] for i in losers]):
        lengths = sorted((len(e.prompt_ids) + len(e.completion_ids) for e in side), reverse=True)
        tokens, places = tokens + sum(lengths), places + 2 * (lengths[0] + lengths[2])
    monkeypatch.setattr("ogdopt_harness.training.progress.Speed.seconds_a_step", lambda self: 0.5)
    line = small.line(trainer, trainer.step(0))
    assert 0 < line["padding"] == pytest.approx(1 - tokens / places) and line["tokens_per_second"] == tokens / 0.5


def test_the_first_ogd_step_is_definition_4_1(tok, tmp_path):
    """Sum over tokens, mean over sequences, project, RMSprop: against autograd and the float64 reference."""
    model, expected = small.model(tok), small.model(tok)
    trainer = Trainer(job(tmp_path, tok, warmup_steps=0, per_device_train_batch_size=2), model, tok, torch.device("cpu"), False)
    winners, losers = trainer.plan.rows(0)
    rows = small.preferences(tok)
    sides = [[rows.winners[i] for i in winners], [rows.losers[i] for i in losers]]
    w, x = (
        torch.autograd.grad(-completion_logps(expected, *collate(s, tok.pad_token_id)).logp.mean(), list(expected.parameters()))
        for s in sides
    )
    base = torch.optim.RMSprop(expected.parameters(), lr=1e-3, foreach=False)
    for p, u in zip(expected.parameters(), reference(list(w), list(x), max_norm=10.0)):
        p.grad = u.to(p.dtype)
    base.step()
    line = small.line(trainer, trainer.step(0))
    torch.testing.assert_close(small.vector(model), small.vector(expected), rtol=1e-4, atol=1e-5)
    assert line["ogd/projected_fraction"] <= 1 and line["logps/chosen"] < 0 and line["learning_rate"] == 1e-3


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.loss in LOSSES and m.pairwise and not m.schedule])
def test_the_first_step_of_a_pairwise_method_descends_its_loss(method, tok, tmp_path):
    """Plain SGD moves by the gradient of the batch's mean loss, against the reference, with beta where there is one."""
    model, expected = small.model(tok), small.model(tok)
    options = dict(warmup_steps=0, optimizer="SGD", max_grad_norm=1e9, per_device_train_batch_size=2)
    trainer = Trainer(job(tmp_path, tok, method, **options), model, tok, torch.device("cpu"), False)
    rows, indices = small.preferences(tok), trainer.plan.rows(0)[0]
    chosen, rejected = (
        completion_logps(expected, *collate([side[i] for i in indices], tok.pad_token_id))
        for side in (rows.winners, rows.losers)
    )
    pairs = Pairs(chosen, rejected)
    if LOSSES[METHODS[method].loss].reference:
        pairs = Pairs(chosen, rejected, chosen.logp.detach() + 0.5, rejected.logp.detach() + 1)
    loss = LOSSES[METHODS[method].loss](pairs, **({"beta": 0.5} if METHODS[method].beta else {})).mean()
    loss.backward()
    torch.optim.SGD(expected.parameters(), lr=1e-3).step()
    shifts = {"train_chosen": 0.5, "train_rejected": 1.0}  # a reference apart from the policy
    trainer.scorer.load_reference()
    trainer.scorer.reference = {name: value + shifts.get(name, 0.0) for name, value in trainer.scorer.reference.items()}
    line = small.line(trainer, trainer.step(0))
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert not torch.equal(small.vector(model), small.vector(small.model(tok)))
    torch.testing.assert_close(small.vector(model), small.vector(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dpop"])
def test_micro_batches_make_no_difference(method, tok, tmp_path):
    """DPOP's penalty has its kink at the reference, where every run starts: there the last bits decide its slope."""
    whole = run(tmp_path / "1", tok, method, per_device_train_batch_size=4)
    parts = run(tmp_path / "2", tok, method, per_device_train_batch_size=2)
    torch.testing.assert_close(small.vector(whole), small.vector(parts), rtol=1e-3, atol=2e-5)
    for x, y in zip(lines(tmp_path / "1"), lines(tmp_path / "2")):
        assert x.keys() == y.keys()
        assert all(x[k] == pytest.approx(y[k], rel=2e-2, abs=1e-3) for k in x if k not in ("tokens_per_second", "padding"))


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_run(method, tok, tmp_path):
    assert torch.equal(small.vector(run(tmp_path / "1", tok, method)), small.vector(run(tmp_path / "2", tok, method)))


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_bit_for_bit(method, tok, tmp_path, monkeypatch):
    """SIGTERM in the middle of an epoch saves and raises Stopped; the continued run equals an undisturbed one."""
    whole = run(tmp_path / "whole", tok, method)
    step = Trainer.step

    def interrupted(self, k):
        if k == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, k)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(Stopped, match="saved at step 4 of 6"):
        run(tmp_path / "cut", tok, method)
    assert not (tmp_path / "cut" / "complete.json").exists()
    monkeypatch.setattr(Trainer, "step", step)
    cut = run(tmp_path / "cut", tok, method, seed=99)
    assert torch.equal(small.vector(cut), small.vector(whole))
    drop = lambda rows: [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]  # noqa: E731
    assert drop(lines(tmp_path / "cut")) == drop(lines(tmp_path / "whole"))


def test_a_killed_run_takes_the_lost_steps_again(tok, tmp_path, monkeypatch):
    """What was logged behind the last checkpoint is forgotten with the steps themselves."""
    whole = run(tmp_path / "whole", tok)
    step = Trainer.step

    def killed(self, k):
        if k == 5:
            raise MemoryError
        return step(self, k)

    monkeypatch.setattr(Trainer, "step", killed)
    with pytest.raises(MemoryError):
        run(tmp_path / "cut", tok)
    assert lines(tmp_path / "cut")[-1]["step"] == 5
    monkeypatch.setattr(Trainer, "step", step)
    assert torch.equal(small.vector(run(tmp_path / "cut", tok)), small.vector(whole))
    assert [line["step"] for line in lines(tmp_path / "cut")] == list(range(7))


def test_dpo_starts_at_ln_2_and_ogd_raises_the_winners(tok, tmp_path):
    run(tmp_path / "dpo", tok, "dpo", num_train_epochs=20)
    run(tmp_path / "ogd", tok, "ogd", num_train_epochs=20)
    dpo, ogd = lines(tmp_path / "dpo"), lines(tmp_path / "ogd")
    assert dpo[1]["loss"] == pytest.approx(math.log(2), abs=1e-6) and dpo[1]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    for found in (dpo, ogd):
        assert found[0]["eval_dpo_loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert found[-1]["eval_dpo_loss"] < found[0]["eval_dpo_loss"] and found[-1]["eval_rewards/margins"] > 0
    assert ogd[-1]["eval_logps/chosen"] > ogd[0]["eval_logps/chosen"] + 1


@pytest.mark.parametrize("optimizer", ["RMSprop", "Adam", "AdamW", "SGD"])
def test_in_the_optimizers_metric_every_step_keeps_its_promise(optimizer, tok, tmp_path):
    run(tmp_path, tok, "ogd_metric", num_train_epochs=5, optimizer=optimizer)
    start, still, *moved = lines(tmp_path)
    assert "ogd/passes" not in start and still["learning_rate"] == 0 and "ogd/update_cosine_chosen" not in still
    assert len(moved) == 14
    assert all(line["ogd/update_cosine_rejected"] >= -1e-5 and line["ogd/update_cosine_chosen"] < 0 for line in moved)
    assert max(line["ogd/passes"] for line in moved) > 1


def test_plain_ogd_logs_the_promises_that_rmsprop_breaks(tok, tmp_path):
    run(tmp_path, tok, "ogd", num_train_epochs=5)
    found = [line["ogd/update_cosine_rejected"] for line in lines(tmp_path)[2:]]
    assert len(found) == 14 and min(found) < -0.01
    assert not any("ogd/passes" in line for line in lines(tmp_path))


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_methods_of_one_gradient_have_no_promise_to_log(method, tok, tmp_path):
    run(tmp_path, tok, method)
    assert not any(key.startswith("ogd/") for line in lines(tmp_path) for key in line)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "Adamax"}, r"'ogd_metric' cannot use optimizer Adamax .*for .*RMSprop.*; found Adamax"),
        ({"optimizer_args": {"maximize": True}}, r"optimizer_args \{'maximize': True\}: .*found maximize=True"),
        ({"optimizer_args": {"bta": 1}}, r"RMSprop with optimizer_args \{'bta': 1\}: .*unexpected keyword argument 'bta'"),
    ],
)
def test_an_optimizer_that_will_not_do_is_refused_by_name(options, message, tok, tmp_path):
    with pytest.raises(ValueError, match=message):
        Trainer(job(tmp_path, tok, "ogd_metric", **options), small.model(tok), tok, torch.device("cpu"), False)


def test_files_of_a_finished_run(tok, tmp_path):
    run(tmp_path, tok, "dpo", save_steps=2)
    done = json.loads((tmp_path / "complete.json").read_text())
    assert (done["steps"], done["epochs"], done["skipped_steps"]) == (6, 2, 0) and done["seconds"] > 0
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["epoch-1", "epoch-2"]
    card = (tmp_path / "model" / "epoch-2" / "README.md").read_text()
    assert "eval_rewards/margins" in card and "library_name: transformers" in card
    names = {"loss", "learning_rate", "grad_norm", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected"}
    names |= {"rewards/margins", "rewards/accuracies", "tokens_per_second", "step", "epoch"}
    assert names <= set(lines(tmp_path)[1])


def test_unpaired_rows_train_ogd_and_refuse_dpo(tok, tmp_path):
    data = small.preferences(tok, paired=False)
    assert len(data.winners) == 2 * len(data.losers)
    run(tmp_path, tok, "ogd", data=data)
    assert lines(tmp_path)[-1]["step"] == 6
    with pytest.raises(ValueError, match="'dpo' compares two answers to one prompt, but the preference rows are unpaired"):
        job(tmp_path, tok, "dpo", data=data)


def test_a_row_that_is_not_finite_is_skipped_counted_and_logged(tok, tmp_path, monkeypatch):
    poison, calls = GradientSource._collect_side, []

    def poisoned(self, side, *args):
        logps = poison(self, side, *args)
        calls.append(side)
        if (len(calls) + 1) // 2 == 3:  # the third step's two sides
            next(iter(getattr(self.optimizer._parts.sides, side).values())).fill_(float("nan"))
        return logps

    monkeypatch.setattr(GradientSource, "_collect_side", poisoned)
    run(tmp_path, tok)
    assert json.loads((tmp_path / "complete.json").read_text())["skipped_steps"] == 1
    assert [line["step"] for line in lines(tmp_path) if line.get("skipped")] == [3]
    # step 1 has learning rate 0
    assert [line["step"] for line in lines(tmp_path) if "ogd/update_cosine_rejected" in line] == [2, 4, 5, 6]


@pytest.mark.parametrize(("options", "steps"), [({"update_cosine_steps": 2}, [2, 4, 6, 8]), ({"eval_steps": 5}, [3, 5, 6, 9])])
def test_changes_are_measured_where_held_out_pairs_are_or_as_often_as_asked(options, steps, tok, tmp_path):
    """Three steps an epoch."""
    run(tmp_path, tok, num_train_epochs=3, **options)
    assert [line["step"] for line in lines(tmp_path) if "ogd/update_cosine_rejected" in line] == steps


def test_a_fused_run_and_one_with_a_rounded_loser_end_where_others_do(tok, tmp_path):
    plain = torch.cat([p.flatten() for p in run(tmp_path / "plain", tok, num_train_epochs=3).parameters()])
    start = torch.cat([p.flatten() for p in small.model(tok).parameters()])
    for options, near in (({"fused": True}, 1e-4), ({"set_aside": "bfloat16"}, 0.05), ({"set_aside": "int8"}, 0.2)):
        task = job(tmp_path / "".join(options), tok, num_train_epochs=3, **options)
        trainer = Trainer(task, prepare(small.model(tok), small.MODEL, CPU), tok, CPU, False)
        trainer.run()
        found = torch.cat([p.detach().flatten() for p in trainer.scorer.model.parameters()])
        assert 0 < (found - plain).norm() < near * (plain - start).norm(), options
        assert trainer.optimizer.unfused == "" and trainer.optimizer.fused == ("fused" in options)


def test_every_row_is_seen_once_an_epoch():
    plan = Plan(10, 10, True, small.stage(train_batch_size=4, num_train_epochs=3), seed=0)
    assert (plan.steps_per_epoch, plan.steps) == (3, 9)
    for epoch in range(3):
        assert sorted(i for k in range(3) for i in plan.rows(3 * epoch + k)[0]) == list(range(10))
    assert plan.rows(0) == plan.rows(0) and plan.rows(0) != plan.rows(3)


def test_the_smaller_unpaired_side_starts_over():
    plan = Plan(12, 5, False, small.stage(train_batch_size=4, num_train_epochs=1), seed=0)
    losers = [plan.rows(k)[1] for k in range(3)]
    assert sorted(losers[0] + losers[1]) == list(range(5)) and len(losers[2]) == 4


def test_runs_of_a_study():
    assert [r.label for r in runs(["ogd", "dpo"], [0.2, 0.05])] == ["OGD", "DPO β=0.2", "DPO β=0.05"]
    (spec,) = runs(["ogd_metric"], [])
    assert (spec.name, spec.label, spec.beta) == ("ogd_metric", "OGD (own metric)", None)


def test_methods_table():
    """What tells ogd_metric from ogd is the metric alone."""
    assert list(METHODS)[:8] == ["sft", "dpo", "ogd", "ogd_metric", "mix", "alright", "maxright", "sequential"]
    assert all(set(method.sides) == {"winner", "loser"} for method in METHODS.values() if method.pairwise)
    assert {method.loss for method in METHODS.values()} - {"nll", "sparse"} == set(LOSSES)
    metrics = {name: method.metric for name, method in METHODS.items() if method.two_gradients}
    assert metrics.pop("ogd_metric") == "optimizer" and set(metrics.values()) == {"euclidean"}
    assert list(metrics) == ["ogd", "mix_ogd", "alright_ogd", "maxright_ogd", "npo"]
    assert dataclasses.replace(METHODS["ogd_metric"], metric="euclidean", label="OGD") == METHODS["ogd"]


def test_unknown_methods_and_betas_are_refused():
    with pytest.raises(ValueError, match=r"\['odg'\]; expected different names out of sft, dpo, ogd, ogd_metric"):
        runs(["odg"], [0.1])
    with pytest.raises(ValueError, match="expected one or more different positive"):
        runs(["dpo"], [0.1, -1])


def test_no_validation_without_held_out_rows(tok, tmp_path):
    model = prepare(small.model(tok), small.MODEL, torch.device("cpu"))
    rows = small.preferences(tok)
    plain = Job(tmp_path, "s", "sft", small.stage(train_on_prompt=True), Preferences(rows.winners, [], False), None)
    train(plain, model, tok, torch.device("cpu"))
    assert lines(tmp_path)[0] == {"step": 0, "epoch": 0.0}
