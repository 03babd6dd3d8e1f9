"""Reward models: balanced gradients, the reward's place, training like any method, and their place in the report."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ogdopt.diagnostics import weights
from ogdopt.losses import LOSSES, Completion, Pairs, bradley_terry
from ogdopt_harness.config.schema import LoraConfig
from ogdopt_harness.data.examples import collate
from ogdopt_harness.modeling.shard import prepare
from ogdopt_harness.reporting.stability import STEADY
from ogdopt_harness.training.methods import METHODS
from ogdopt_harness.training.reward import RewardTrainer, load_reward_model
from tests import small
from tests.test_report import QUICK, write_report, write_study
from tests.test_train import job, lines


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return small.tokenizer(tmp_path_factory.mktemp("tok"))


@pytest.fixture(scope="module")
def start(tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    small.model(tok).save_pretrained(folder)
    return folder


def reward_model(start, tok, seed=0):
    model = load_reward_model(small.MODEL, start, tok.pad_token_id, seed)
    return prepare(model, small.MODEL, torch.device("cpu"))


def trainer(folder, start, tok, seed=0, **changes):
    task = job(folder, tok, "reward_model", **changes)
    return RewardTrainer(task, reward_model(start, tok, seed), tok, torch.device("cpu"), False)


@given(st.floats(-50, 50), st.floats(-50, 50))
def test_the_gradients_of_bradley_terry_are_balanced(chosen, rejected):
    """dL/dr+ = -sigmoid(r- - r+) = -dL/dr-, whatever the rewards: no gradient runs away where the other vanishes."""
    r = torch.tensor([chosen, rejected], dtype=torch.float64, requires_grad=True)
    pairs = Pairs(*(Completion(x[None, None], torch.ones(1, 1)) for x in r))
    loss = bradley_terry(pairs).sum()
    loss.backward()
    assert loss.item() == pytest.approx(torch.nn.functional.softplus(r[1] - r[0], threshold=1e9).item(), rel=1e-12)
    assert r.grad[0] == -r.grad[1] and r.grad[0].item() == pytest.approx(-torch.sigmoid(r[1] - r[0]).item(), rel=1e-12)
    assert weights(LOSSES["bradley_terry"], pairs)[0].item() == pytest.approx(-r.grad[0].item(), rel=1e-6)


def test_a_reward_is_the_head_on_the_last_token(tok, start, tmp_path):
    """Of each sequence by itself, unpadded: padding and the prompt's length change nothing."""
    task = trainer(tmp_path, start, tok)
    rows = small.preferences(tok)
    scores = task.scorer.score(rows.winners, on_prompt=True)
    sequences = [torch.tensor([row.prompt_ids + row.completion_ids]) for row in rows.winners]
    expected = torch.cat(
        [task.scorer.model.score(task.scorer.model.model(ids).last_hidden_state[:, -1])[:, 0] for ids in sequences]
    )
    torch.testing.assert_close(scores.logp, expected, rtol=1e-5, atol=1e-6)
    assert ((scores.logps != 0).sum(1) == 1).all()
    assert scores.length.tolist() == [len(row.completion_ids) for row in rows.winners]


def test_the_first_step_descends_the_bradley_terry_loss(tok, start, tmp_path):
    options = dict(warmup_steps=0, optimizer="SGD", max_grad_norm=None, per_device_train_batch_size=2)
    task, expected = trainer(tmp_path, start, tok, **options), reward_model(start, tok)
    rows, indices = small.preferences(tok), trainer(tmp_path, start, tok, **options).plan.rows(0)[0]
    rewards = []
    for side in (rows.winners, rows.losers):
        batch = collate([side[i] for i in indices], tok.pad_token_id)
        rewards.append(expected(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0])
    loss = torch.nn.functional.softplus(rewards[1] - rewards[0]).mean()
    loss.backward()
    torch.optim.SGD(expected.parameters(), lr=1e-3).step()
    line = small.line(task, task.step(0))
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["rewards/chosen"] == pytest.approx(rewards[0].mean().item(), rel=1e-4, abs=1e-6)
    assert line["rewards/margins"] == pytest.approx((rewards[0] - rewards[1]).mean().item(), rel=1e-3, abs=1e-6)
    torch.testing.assert_close(small.vector(task.scorer.model), small.vector(expected), rtol=1e-5, atol=1e-7)


def test_it_learns_goes_on_where_it_was_stopped_and_is_kept(tok, start, tmp_path, monkeypatch):
    """Held-out pairs are ordered in the end; a stopped and continued run is the undisturbed one, bit for bit."""
    options = dict(learning_rate=5e-3, num_train_epochs=4, save_steps=2)
    whole = trainer(tmp_path / "whole", start, tok, **options)
    whole.run()
    with monkeypatch.context() as patch:
        patch.setattr(RewardTrainer, "_enough", lambda self, line: 1 / (self.scheduler.last_epoch != 5) and "")
        with pytest.raises(ZeroDivisionError):
            trainer(tmp_path / "parts", start, tok, eval_steps=1, **options).run()
    parts = trainer(tmp_path / "parts", start, tok, seed=9, **options)
    parts.run()
    assert torch.equal(small.vector(whole.scorer.model), small.vector(parts.scorer.model))
    last = lines(tmp_path / "whole")[-1]
    assert last["eval_rewards/accuracies"] == 1.0 and last["eval_rewards/margins"] > 0 and last["eval_loss"] < 0.69
    assert not any(key.startswith(("eval_logps", "3d/", "logps")) for key in last)
    again = load_reward_model(small.MODEL, tmp_path / "whole" / "model" / "epoch-4", tok.pad_token_id, 3)
    assert torch.equal(small.vector(again), small.vector(whole.scorer.model))


def test_mistakes_are_named(tok, start, tmp_path):
    with pytest.raises(ValueError, match="reward_model trains all weights"):
        load_reward_model(dataclasses.replace(small.MODEL, lora=LoraConfig()), start, 0, 0)
    with pytest.raises(ValueError, match="reward_model trains all weights"):
        load_reward_model(dataclasses.replace(small.MODEL, train_only=["lm_head"]), start, 0, 0)
    with pytest.raises(ValueError, match="reward_model: no model at"):
        load_reward_model(small.MODEL, tmp_path, 0, 0)


def test_reports_compare_it_with_policies(tmp_path):
    write_study(tmp_path / "run", seeds=(0, 1))
    report = write_report(tmp_path / "run", QUICK)
    assert report.table(STEADY) is None
    for seed in (0, 1):
        folder = tmp_path / "run" / f"seed-{seed}" / "reward_model"
        folder.mkdir()
        (folder / "config.yaml").write_text(
            "run: {name: reward_model, kind: reward, method: reward_model, label: Reward model}\n"
        )
        rows = [{"step": k, "eval_rewards/accuracies": 0.5 + 0.004 * k} for k in range(0, 101, 10)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert any(
        "reward_model: no complete.json" in line for line in write_report(tmp_path / "run", QUICK).found.study.incomplete
    )
    for seed in (0, 1):
        (tmp_path / "run" / f"seed-{seed}" / "reward_model" / "complete.json").write_text('{"steps": 100, "epochs": 5}')
    report = write_report(tmp_path / "run", QUICK)
    table = report.table(STEADY)
    assert table.rows[0][:2] == ["Reward model", "90.0%"] and len(table.rows) == 5
    assert "pairs_ordered" in [drawing.file.stem for drawing in report.drawings]
    assert METHODS["reward_model"].reward and "reward_model" not in report.found.points
