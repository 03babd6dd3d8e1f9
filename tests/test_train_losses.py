"""Methods that are more than one loss of pairs, and what training says of its two gradients."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader

from ogdopt.diagnostics import entanglement, weights
from ogdopt.gram import gram
from ogdopt.losses import LOSSES, Pairs, dpo, kto_unpaired, simpo, sparse
from ogdopt_harness.commands.usage import parse
from ogdopt_harness.config.schema import LoraConfig, SparseConfig
from ogdopt_harness.data.examples import Example, Preferences, collate, mismatched
from ogdopt_harness.modeling.score import completion_logps
from ogdopt_harness.modeling.shard import prepare
from ogdopt_harness.reporting.figures import layers
from ogdopt_harness.training.job import Job
from ogdopt_harness.training.methods import METHODS, check_loss_args
from ogdopt_harness.training.trainer import Trainer, train
from tests import small

CPU = torch.device("cpu")
SGD = dict(warmup_steps=0, optimizer="SGD", max_grad_norm=1e9, per_device_train_batch_size=2)


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return small.tokenizer(tmp_path_factory.mktemp("tok"))


def trainer(folder, tok, method, data=None, model=None, **changes):
    data = data or small.preferences(tok)
    stage = small.stage(**(SGD | changes))
    made = Job(folder, method, method, stage, data, small.preferences(tok, seed=5), 0.5)
    found = Trainer(made, model or small.model(tok), tok, CPU, False)
    found.scorer.load_reference()
    found.scorer.reference = {name: x - 0.5 * (1 + len(name) % 2) for name, x in found.scorer.reference.items()}
    if found.scorer.sparse is not None:
        found.scorer.sparse.reference = found.scorer.reference["train_tokens"]
    return found


def scored(model, tok, rows):
    return completion_logps(model, *collate(rows, tok.pad_token_id))


def gradients(model, value):
    return torch.autograd.grad(value, list(model.parameters()), retain_graph=True)


def parts(made, tok, model):
    """The first batch's pairs, their reference included, and its rows' numbers."""
    rows = made.plan.rows(0)[0]
    sides = [scored(model, tok, [side[i] for i in rows]) for side in (made.job.data.winners, made.job.data.losers)]
    return Pairs(*sides, *(made.scorer.reference[f"train_{side}"][rows] for side in ("chosen", "rejected"))), rows


def moved(made, tok, lr=1e-3):
    """What one step of SGD changed, over the learning rate."""
    before = small.vector(made.scorer.model)
    line = small.line(made, made.step(0))
    return (before - small.vector(made.scorer.model)) / lr, line


def flat(grads):
    return torch.cat([g.flatten() for g in grads])


def test_the_first_step_of_npo_is_the_difference_of_unit_gradients_times_dpo_s_weight(tok, tmp_path):
    made = trainer(tmp_path, tok, "npo")
    model = small.model(tok)
    pairs, _ = parts(made, tok, model)
    w, l = (flat(gradients(model, c.logp.mean())) for c in pairs[:2])
    kappa = weights(dpo, pairs, beta=0.5)[0].mean()
    change, line = moved(made, tok)
    torch.testing.assert_close(change, -kappa * (w / w.norm() - l / l.norm()), rtol=1e-3, atol=1e-4)
    assert line["npo/weight"] == pytest.approx(kappa.item(), rel=1e-5) and 0 < kappa < 0.5
    assert line["ogd/coefficient"] == pytest.approx((kappa / l.norm()).item(), rel=1e-4)


def test_the_first_step_of_npo_by_pairs_gives_each_pair_its_own(tok, tmp_path):
    made = trainer(tmp_path, tok, "npo_pair")
    model = small.model(tok)
    pairs, rows = parts(made, tok, model)
    kappas = weights(dpo, pairs, beta=0.5)[0]
    expected, each = 0, []
    for k in range(len(rows)):
        w, l = (flat(gradients(model, c.logp[k])) for c in pairs[:2])
        expected = expected - kappas[k] * (w / w.norm() - l / l.norm()) / len(rows)
        each.append(entanglement(gram([w], [l])))
    change, line = moved(made, tok)
    torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-4)
    assert line["npo/weight"] == pytest.approx(kappas.mean().item(), rel=1e-5)
    for name in ("cosine", "norm_chosen", "condition_rejected"):
        values = [found[f"entanglement/{name}"] for found in each]
        assert line[f"entanglement/{name}"] == pytest.approx(sum(values) / len(values), rel=1e-4)
    assert not any(name.startswith("ogd/") for name in line)


def sparse_expected(made, tok, model, rows, w):
    """The mean sparse loss of a batch, from its definition; `w` (side, rows, T) are the significances."""
    sides = [[side[i] for i in rows] for side in (made.job.data.winners, made.job.data.losers)]
    ours = [scored(model, tok, side) for side in sides]
    start = small.model(tok)
    theirs = [c._replace(logps=(c.logps.detach() - shift) * c.mask) for c, shift in
              zip([scored(start, tok, side) for side in sides], made.shifts)]  # fmt: skip
    return sparse(Pairs(*ours), Pairs(*theirs), w, beta=0.5, steepness=5.0, l1=0.1).mean()


@pytest.mark.parametrize("kind", ["hidden", "free"])
def test_the_first_step_of_sparse_descends_its_loss_in_model_and_significance(kind, tok, tmp_path):
    options = {
        "sparse": SparseConfig(kind, learning_rate=1e-3, initial=0.2),
        "loss_args": {"sparse": {"steepness": 5.0, "l1": 0.1}},
    }
    made = trainer(tmp_path, tok, "sparse", **options)
    made.shifts = [0.5 * (1 + len("train_tokens") % 2)] * 2
    model = small.model(tok)
    rows = made.plan.rows(0)[0]
    head = [p.detach().clone().requires_grad_() for p in made.scorer.sparse.significance.parameters()]
    w = []
    for k, side in enumerate((made.job.data.winners, made.job.data.losers)):
        states: list = []
        batch = collate([side[i] for i in rows], tok.pad_token_id)
        mask = completion_logps(model, *batch, states).mask
        if kind == "hidden":
            values = (states[0] @ head[0].T + head[1]).squeeze(-1)
        else:
            ends = made.scorer.sparse.ends
            values = torch.cat([head[0][ends[k * 12 + i] : ends[k * 12 + i + 1]] for i in rows])
        w.append(torch.zeros(mask.shape).masked_scatter(mask, values))
    loss = sparse_expected(made, tok, model, rows, tuple(w))
    slopes = torch.autograd.grad(loss, [*model.parameters(), *head])
    change, line = moved(made, tok)
    torch.testing.assert_close(change, flat(slopes[: -len(head)]), rtol=1e-3, atol=1e-4)
    for p, before, slope in zip(made.scorer.sparse.significance.parameters(), head, slopes[-len(head) :]):
        torch.testing.assert_close((before - p) / 1e-3, slope, rtol=1e-3, atol=1e-4)
        assert slope.abs().max() > 0
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["sparse/on_chosen"] == line["sparse/on_rejected"] == 1.0


def test_sparse_prunes_tokens_and_still_learns(tok, tmp_path):
    given = {"sparse": SparseConfig(learning_rate=3e-3), "loss_args": {"sparse": {"l1": 0.05}}, "num_train_epochs": 10}
    given |= {"optimizer": "RMSprop", "warmup_steps": 2, "max_grad_norm": 10.0, "per_device_train_batch_size": 4}
    trainer(tmp_path, tok, "sparse", **given).run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["sparse/w_chosen"] == pytest.approx(0.5) and lines[-1]["sparse/w_chosen"] < 0.25
    assert min(line["sparse/on_rejected"] for line in lines[1:]) < 1.0
    assert lines[-1]["eval_rewards/margins"] > 0
    saved = FileSystemReader(sorted((tmp_path / "checkpoint").iterdir())[-1]).read_metadata().state_dict_metadata
    assert {"model.1.head.weight", "model.1.head.bias"} <= set(saved)
    assert "head.weight" not in load_file(tmp_path / "model" / "epoch-10" / "model.safetensors")


@pytest.mark.parametrize("paired", [True, False])
def test_the_first_step_of_kto_descends_its_loss_of_pairs_or_not(paired, tok, tmp_path):
    """The divergence is the mean log-ratio of mismatched answers, the same for all micro-batches."""
    options = {"loss_args": {"kto": {"undesirable_weight": 2.0}}}
    made = trainer(tmp_path, tok, "kto", data=small.preferences(tok, paired=paired), **options)
    made.scorer.reference["train_mismatched"] -= 3.0
    model, data = small.model(tok), made.job.data
    rows = made.plan.rows(0)
    assert (rows[0] == rows[1]) == paired
    others = [*data.winners, *data.losers]
    places = [*rows[0], *(len(data.winners) + i for i in rows[1])]
    crossed = [Example(others[k].prompt_ids, others[(k + 1) % len(others)].completion_ids) for k in places]
    z = (scored(model, tok, crossed).logp.detach() - made.scorer.reference["train_mismatched"][places]).mean().clamp(min=0)
    assert z > 1
    loss = 0
    for wanted, side, name, indices in (
        (True, data.winners, "chosen", rows[0]),
        (False, data.losers, "rejected", rows[1]),
    ):
        completion = scored(model, tok, [side[i] for i in indices])
        ref = made.scorer.reference[f"train_{name}"][indices]
        each = kto_unpaired(completion, ref, torch.full((4,), wanted), beta=0.5, undesirable_weight=2.0, z_ref=z)
        loss = loss + each.mean()
    expected = flat(gradients(model, loss))
    change, line = moved(made, tok)
    torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-4)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5) and line["kl"] == pytest.approx(z.item(), rel=1e-4)


def test_kto_needs_both_labels(tok, tmp_path):
    data = small.preferences(tok, paired=False)
    with pytest.raises(ValueError, match="'kto' needs preferred and rejected completions, and there are 12 and 0"):
        trainer(tmp_path, tok, "kto", data=dataclasses.replace(data, losers=[]))


def test_mismatched_rows_are_no_longer_than_the_longest(tok):
    data = Preferences([Example([1, 2, 3], [4]), Example([1], [5, 6, 7])], [Example([2], [8])], False)
    found = mismatched(data)
    assert [x.prompt_ids for x in found] == [[1, 2, 3], [1], [2]]
    assert [x.completion_ids for x in found] == [[5], [8], [4]]


def test_hyper_parameters_of_losses_reach_them(tok, tmp_path):
    made = trainer(tmp_path, tok, "simpo", loss_args={"simpo": {"simpo_gamma": 3.0}})
    model = small.model(tok)
    loss = simpo(parts_without_reference(made, tok, model), beta=0.5, simpo_gamma=3.0).mean()
    assert moved(made, tok)[1]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def parts_without_reference(made, tok, model):
    rows = made.plan.rows(0)[0]
    return Pairs(*(scored(model, tok, [side[i] for i in rows]) for side in (made.job.data.winners, made.job.data.losers)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"simop": {}}, "names 'simop'; expected methods out of sft, dpo"),
        ({"simpo": {"gamma": 1.0}}, r"loss_args.simpo has 'gamma'; expected simpo_gamma \(beta is preference.beta\)"),
        ({"dpo": {"beta": 1.0}}, r"loss_args.dpo has 'beta'; expected nothing \(beta is preference.beta\)"),
        ({"slic_hf": {"delta": "1"}}, "loss_args.slic_hf.delta is '1'; expected a value like its default, 1.0"),
        ({"ipo": {"average_log_prob": 1}}, "ipo.average_log_prob is 1; expected a value like its default, False"),
    ],
)
def test_hyper_parameters_that_a_loss_has_not(given, message):
    with pytest.raises(ValueError, match=message):
        check_loss_args(given)


def test_hyper_parameters_on_the_command_line():
    words = ["--preference.loss_args", "{simpo: {simpo_gamma: 0.3}, sparse: {l1: 0.1}, ipo: {average_log_prob: true}}"]
    config = parse([*words, "--preference.sparse.significance", "free", "--preference.probe_steps", "5"]).preference
    assert config.loss_args == {"simpo": {"simpo_gamma": 0.3}, "sparse": {"l1": 0.1}, "ipo": {"average_log_prob": True}}
    check_loss_args(config.loss_args)
    assert config.sparse == SparseConfig("free") and config.probe_steps == 5
    assert {name for name, method in METHODS.items() if method.options} >= {"kto", "sparse", "flex_dpo", "slic_hf"}


NAMES = {"inner_product", "cosine", "norm_chosen", "norm_rejected", "condition_chosen", "condition_rejected", "case"}


@pytest.mark.parametrize("method", ["ogd", "npo", "npo_pair", "ogd_metric"])
def test_two_gradients_speak_at_every_step(method, tok, tmp_path):
    made = trainer(tmp_path, tok, method)
    model = small.model(tok)
    pairs, _ = parts(made, tok, model) if METHODS[method].reference else (parts_without_reference(made, tok, model), 0)
    ws, ls = (gradients(model, c.logp.mean()) for c in pairs[:2])
    line = small.line(made, made.step(0))
    assert {f"entanglement/{name}" for name in NAMES} <= set(line)
    if method != "npo_pair":
        expected = entanglement(gram(ws, ls))
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-4)
        assert {"entanglement/layer/0", "entanglement/layer/1", "entanglement/layer/embed_tokens"} <= set(made._layers())


@pytest.mark.parametrize("method", ["dpo", "simpo", "kto", "sft", "sparse"])
def test_one_gradient_is_probed_now_and_then(method, tok, tmp_path):
    """What the two gradients say, with the weights of the loss at hand, and what the step did to both log-probabilities."""
    made = trainer(tmp_path, tok, method, probe_steps=2, learning_rate=1e-5)
    model = small.model(tok)
    pairs, _ = parts(made, tok, model) if METHODS[method].reference else (parts_without_reference(made, tok, model), 0)
    numbers = gram(*(gradients(model, c.logp.mean()) for c in pairs[:2]))
    before = [c.logp.mean().item() for c in pairs[:2]]
    line = small.line(made, made.step(0))
    after = [c.logp.mean().item() for c in parts_without_reference(made, tok, made.scorer.model)[:2]]
    for name, x, y in zip(("chosen", "rejected"), before, after):
        assert line[f"entanglement/realised_{name}"] == pytest.approx(y - x, abs=2e-5)
        assert line[f"entanglement/predicted_{name}"] == pytest.approx(line[f"entanglement/realised_{name}"], rel=0.1, abs=2e-5)
    assert line["entanglement/cosine"] == pytest.approx(numbers.pooled([len(numbers.ww)]).cosine.item(), rel=1e-4)
    if method in ("dpo", "simpo"):
        d_w, d_l = (d.mean().item() for d in weights(LOSSES[method], pairs, beta=0.5))
        assert line["entanglement/weight_chosen"] == pytest.approx(d_w, rel=1e-4)
        expected = entanglement(numbers, d_w, d_l)
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert ("entanglement/case" in line) == (method != "sparse") and "entanglement/layer/0" in line
    assert not any(name.startswith("entanglement/") for name in small.line(made, made.step(1)))


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_probe_changes_nothing(method, tok, tmp_path):
    ends = []
    for every in (None, 2):
        model = prepare(small.model(tok), dataclasses.replace(small.MODEL, lora=LoraConfig(r=2)), CPU, seed=1)
        folder = tmp_path / str(every)
        data = small.preferences(tok)
        train(Job(folder, "x", method, small.stage(probe_steps=every), data, None, 0.5), model, tok, CPU)
        ends.append(small.vector(model))
    assert torch.equal(*ends)


def test_layers_are_logged_where_held_out_rows_are_measured(tok, tmp_path):
    job = Job(tmp_path, "ogd", "ogd", small.stage(eval_steps=3), small.preferences(tok), small.preferences(tok, seed=5))
    train(job, small.model(tok), tok, CPU)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "entanglement/layer/0" in line] == [3, 6]
    assert all(-1 <= line["entanglement/layer/0"] <= 1 for line in lines if "entanglement/layer/0" in line)
    assert all(math.isfinite(line["entanglement/cosine"]) for line in lines[1:])


def test_layers_in_the_report(tok, tmp_path):
    """One curve a run, the mean over its logged steps, from what training wrote; layers without number are left out."""
    job = Job(tmp_path, "ogd", "ogd", small.stage(eval_steps=3), small.preferences(tok), small.preferences(tok, seed=5))
    train(job, small.model(tok), tok, CPU)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    ((x, y),) = layers({"ogd": [SimpleNamespace(metrics=lines)]})["ogd"]
    assert x.tolist() == [0, 1]
    logged = [line["entanglement/layer/1"] for line in lines if "entanglement/layer/1" in line]
    assert len(logged) == 2 and y[1] == pytest.approx(sum(logged) / 2)
