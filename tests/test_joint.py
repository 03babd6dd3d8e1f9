"""Pairs and supervised rows in one run: whose step it is, which rows it takes, which gradient, what is logged and refused."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from ogdopt.losses import Pairs, dpo
from ogdopt_harness.config.schema import Config, JointConfig, PreferenceConfig
from ogdopt_harness.data.examples import Preferences, collate, order
from ogdopt_harness.modeling.score import completion_logps
from ogdopt_harness.modeling.shard import prepare
from ogdopt_harness.pipeline.stages import SeedStudy
from ogdopt_harness.training.gradients import GradientSource
from ogdopt_harness.training.job import Job
from ogdopt_harness.training.meter import Meter
from ogdopt_harness.training.methods import runs
from ogdopt_harness.training.trainer import Trainer, train
from tests import small
from tests.test_train import JOINT, job, lines, run


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return small.tokenizer(tmp_path_factory.mktemp("tok"))


@pytest.fixture
def steps(monkeypatch):
    """What was trained on, step by step: (stream, rows)."""
    found = []
    collect = GradientSource._collect_stream

    def noted(self, name, indices, *args):
        found.append((name, indices))
        return collect(self, name, indices, *args)

    monkeypatch.setattr(GradientSource, "_collect_stream", noted)
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
    found = runs(["maxright", "sequential"], [], evaluate_every=[1, 10])
    assert [r.label for r in found] == ["MAXRIGHT λ=0.5 k=1", "MAXRIGHT λ=0.5 k=10", "Sequential λ=0.5"]
    assert [(r.name, r.evaluate_every) for r in found[1:]] == [
        ("maxright_lambda0.5_every10", 10),
        ("sequential_lambda0.5", None),
    ]


@pytest.mark.parametrize("every", [[], [10, 10], [0], [-2]])
def test_evaluate_every_out_of_range(every):
    with pytest.raises(ValueError, match=r"joint.evaluate_every is .*; expected one or more different numbers of steps, or -1"):
        runs(["maxright"], [], evaluate_every=every)


@pytest.mark.parametrize("lambdas", [[], [0.5, 0.5], [1.5], [-0.1], [float("nan")]])
def test_lambdas_out_of_range(lambdas):
    assert len(runs(["dpo"], [0.1], lambdas)) == 1
    with pytest.raises(ValueError, match=r"joint.lambdas is .*; expected one or more different numbers from 0 to 1"):
        runs(["alright"], [0.1], lambdas)


def test_the_first_step_of_mix_is_the_weighted_gradient(tok, tmp_path):
    """Against autograd: lambda g_dpo + (1 - lambda) g_sft, in micro-batches of unequal numbers on the two sides."""
    options = {"optimizer": "SGD", "learning_rate": 1.0, "warmup_steps": 0, "max_grad_norm": None}
    model, expected = small.model(tok), small.model(tok)
    task = job(tmp_path, tok, "mix", joint={"batch_size": 6}, per_device_train_batch_size=2, **options)
    trainer = Trainer(task, model, tok, torch.device("cpu"), False)
    trainer.scorer.load_reference()
    batches = {name: plan.rows(0)[0] for name, plan in trainer.source.streams.items()}
    assert {name: len(rows) for name, rows in batches.items()} == {"preference": 4, "sft": 6}

    def scored(examples, indices):
        return completion_logps(expected, *collate([examples[i] for i in indices], tok.pad_token_id))

    chosen, rejected = (scored(side, batches["preference"]) for side in (task.data.winners, task.data.losers))
    f_dpo = dpo(Pairs(chosen, rejected, chosen.logp.detach(), rejected.logp.detach()), beta=0.5).mean()
    assert task.joint is not None
    f_sft = -scored(task.joint.supervised, batches["sft"]).logp.mean()
    (0.7 * f_dpo + 0.3 * f_sft).backward()
    step = torch.cat([p.grad.flatten() for p in expected.parameters()])
    line = small.line(trainer, trainer.step(0))
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


@pytest.mark.parametrize("method", JOINT)
def test_all_the_weight_on_the_pairs_is_their_method_alone(method, tok, tmp_path):
    alone = small.vector(run(tmp_path / "alone", tok, "ogd" if method.endswith("ogd") else "dpo"))
    assert torch.equal(small.vector(run(tmp_path / method, tok, method, joint={"weight": 1.0})), alone)


def test_no_weight_on_the_pairs_is_fine_tuning(tok, tmp_path):
    weightless = [small.vector(run(tmp_path / name, tok, name, joint={"weight": 0.0})) for name in JOINT]
    assert all(torch.equal(vector, weightless[0]) for vector in weightless)


@pytest.mark.parametrize("method", JOINT)
def test_both_objectives_are_measured_on_the_same_rows_for_every_method(method, tok, tmp_path):
    """From their definitions, on a fresh model and at the end; at the start DPO's is ln 2."""
    model = run(tmp_path, tok, method, joint={"objective_rows": 5})
    first, *_, last = [line for line in lines(tmp_path) if "eval_objective/sft" in line]
    task = job(tmp_path, tok, method)
    pairs = order(12, 0, 0)[:5]
    rows = [task.joint.supervised[i] for i in order(7, 0, 0)[:5]]

    def logps(which, examples):
        with torch.no_grad():
            return completion_logps(which, *collate(examples, tok.pad_token_id)).logp

    def objectives(which):
        (a, b), (A, B) = (
            [logps(m, [side[i] for i in pairs]) for side in (task.data.winners, task.data.losers)]
            for m in (which, small.model(tok))
        )
        f_dpo = torch.nn.functional.softplus(-0.5 * ((a - A) - (b - B))).mean()
        return [f_dpo.item(), -logps(which, rows).mean().item()]

    for line, which in ((first, small.model(tok)), (last, model)):
        found = [line[f"eval_objective/{name}"] for name in ("preference", "sft")]
        assert found == pytest.approx(objectives(which), rel=1e-5)
    assert first["eval_objective/preference"] == pytest.approx(math.log(2), rel=1e-6)


def test_ogd_on_the_pairs_takes_turns_with_fine_tuning(tok, tmp_path):
    """A step on pairs projects, a step on supervised rows has nothing to project from; MAXRIGHT goes by the DPO loss."""
    run(tmp_path, tok, "maxright_ogd", num_train_epochs=5)
    _, *found = lines(tmp_path)
    assert {line["objective/chosen"] for line in found} == {0.0, 1.0}
    for line in found:
        pairs = line["objective/chosen"] == 1.0
        assert ("ogd/cosine" in line) == ("logps/rejected" in line) == pairs
        if pairs:
            assert line["objective/gap_preference"] >= line["objective/gap_sft"] and line["objective/preference"] < 1.5
    assert any(line.get("ogd/coefficient", 0) > 0 for line in found)


def test_a_run_stops_once_it_is_good_enough(tok, tmp_path):
    options = {"num_train_epochs": 5, "eval_steps": 1}
    close = {"stop_gap": 0.05, "optima": {"preference": 0.6, "sft": 0.0}}
    stopped = run(tmp_path / "a", tok, "mix", joint=close, **options)
    *_, before, last = lines(tmp_path / "a")
    done = json.loads((tmp_path / "a" / "complete.json").read_text())
    assert last["eval_objective/preference"] <= 0.65 < before["eval_objective/preference"]
    assert done["steps"] == last["step"] < 15 and "preference is 0." in done["stopped"]
    assert (tmp_path / "a" / "model" / f"epoch-{done['epochs']}").is_dir()
    (tmp_path / "a" / "complete.json").unlink()  # killed behind its last checkpoint: it does not go on
    assert torch.equal(small.vector(run(tmp_path / "a", tok, "mix", joint=close, **options)), small.vector(stopped))
    assert json.loads((tmp_path / "a" / "complete.json").read_text()) == done

    good = {"stop_gap": 0.05, "stop_pareto": [[0.6, 0.0], [0.6, 1000.0]], "optima": {"preference": 0.0, "sft": 0.0}}
    run(tmp_path / "b", tok, "mix", joint=good, **options)
    done = json.loads((tmp_path / "b" / "complete.json").read_text())
    assert done["steps"] == last["step"] and done["stopped"] == "both objectives have reached preference 0.6, sft 1000"
    run(tmp_path / "c", tok, "sequential", joint=close, **options)
    assert json.loads((tmp_path / "c" / "complete.json").read_text())["steps"] == 15


def test_the_reference_may_be_another_model_than_the_start(tok, tmp_path):
    """Then the DPO loss does not begin at ln 2, and only log-probabilities of the reference are kept."""
    start, reference = (prepare(small.model(tok, seed), small.MODEL, torch.device("cpu")) for seed in (0, 7))
    task = job(tmp_path, tok, "alright")
    train(task, start, tok, torch.device("cpu"), reference=lambda: reference)
    line = lines(tmp_path)[0]
    assert abs(line["eval_objective/preference"] - math.log(2)) > 1e-3 and line["eval_rewards/margins"] != 0
    with torch.no_grad():
        scored = completion_logps(reference, *collate(task.data.winners, tok.pad_token_id)).logp
    torch.testing.assert_close(load_file(tmp_path / "reference.safetensors")["train_chosen"], scored, rtol=1e-5, atol=1e-5)


def test_steps_cost_time_and_memory_and_a_resumed_run_adds_up(tok, tmp_path):
    run(tmp_path, tok, "alright")
    done = json.loads((tmp_path / "complete.json").read_text())
    assert 0 < done["step_seconds"] <= done["seconds"] and done["step_cpu_seconds"] > 0
    meter = Meter(torch.device("cpu"))
    with meter:
        held = torch.ones(8_000_000)
    once = meter.added_to({})
    with meter:
        pass
    twice = meter.added_to(once)
    assert twice["step_seconds"] > once["step_seconds"] and meter.totals["step_seconds"] == 0
    if "peak_memory" in once:  # Linux
        assert once["peak_memory"] > held.nbytes and twice["peak_memory"] >= once["peak_memory"]


@pytest.mark.parametrize("method", JOINT)
def test_without_supervised_rows_or_pairs(method, tok, tmp_path):
    data = small.preferences(tok)
    with pytest.raises(ValueError, match=f"'{method}' trains on supervised rows together with the pairs, and there are none"):
        Job(tmp_path, "x", method, small.stage(), data, None, beta=0.1)
    with pytest.raises(ValueError, match=f"'{method}' compares two answers to one prompt, but .* unpaired"):
        job(tmp_path, tok, method, data=Preferences(data.winners, data.losers[:5], paired=False))


def test_a_study_without_supervised_rows_ends_before_it_starts():
    with pytest.raises(
        ValueError, match=r"alright trains on supervised rows .*, but joint.data.train and sft.data.train are e"
    ):
        SeedStudy(Config(methods=["dpo", "alright"], device="cpu"), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, r"joint.beta is 0.0; expected more than 0"),
        ({"optima": {"sft": 1.0}}, r"joint.optima is \{'sft': 1.0\}; expected \{preference: x, sft: y\}"),
        (
            {"train_batch_size": 96},
            r"joint.train_batch_size is 96; expected a multiple of preference.per_device.* \(64\), or null",
        ),
        ({"train_batch_size": 0}, r"joint.train_batch_size is 0; expected 1 or more, or null"),
        ({"objective_rows": 0}, r"joint.objective_rows is 0; expected 1 or more$"),
        ({"optima_epochs": 0}, r"joint.optima_epochs is 0; expected 1 or more, or null"),
        ({"stop_gap": -1e-4}, r"joint.stop_gap is -0.0001; expected 0 or more, or null"),
        ({"stop_pareto": [[0.1]]}, r"joint.stop_pareto is \[\[0.1\]\]; expected a list of pairs \[preference, sft\], or null"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Config(joint=JointConfig(**options))
    assert Config(joint=JointConfig(train_batch_size=128, optima={"preference": 0.0, "sft": 1.0})).joint.beta == 0.1


def test_train_batch_size_out_of_range():
    with pytest.raises(ValueError, match=r"train_batch_size is 96; expected a multiple"):
        Config(preference=PreferenceConfig(train_batch_size=96))
