"""The 3D-properties (SPEC 3): corollaries about gradients, what the diagnostics say of made-up runs, the toy study."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ogdopt import ProjectedGradient
from ogdopt.losses import LOSSES, Completion, Pairs
from ogdopt.three_d import ThreeD, Thresholds, replay
from ogdopt_harness.analysis import claims
from ogdopt_harness.config.schema import Config
from ogdopt_harness.data.examples import collate
from ogdopt_harness.modeling.score import completion_logps
from ogdopt_harness.modeling.shard import prepare
from ogdopt_harness.pipeline.stages import SeedStudy
from ogdopt_harness.reporting.stability import TITLE
from ogdopt_harness.studies import three_d
from ogdopt_harness.studies.three_d import REMEDIES, SCENARIOS, A, at, drawn, fresh, log_probabilities, start, tune
from ogdopt_harness.training.scoring import unseen_mass
from ogdopt_harness.training.trainer import Trainer
from tests import small
from tests.test_report import QUICK, write_report, write_study
from tests.test_train import job, lines


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return small.tokenizer(tmp_path_factory.mktemp("tok"))


PROBABILITY = st.floats(-20, -0.01).map(math.exp)


def gradients(loss, chosen, rejected, reference=(0.3, 0.2), **options):
    """dL/d pi+ and dL/d pi- of one pair of one-token answers, float64."""
    p = torch.tensor([chosen, rejected], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor(reference, dtype=torch.float64).log()
    sides = [Completion(x.log()[None, None], torch.ones(1, 1)) for x in p]
    LOSSES[loss](Pairs(*sides, ref[:1], ref[1:]), **options).sum().backward()
    return p.grad.tolist()


# ---- corollaries -----------------------------------------------------------------------------------------------------------


@given(PROBABILITY, PROBABILITY, PROBABILITY, PROBABILITY, st.floats(0.01, 2))
def test_corollary_1_the_gradients_are_in_the_inverse_ratio_of_the_probabilities(chosen, rejected, A, B, beta):
    up, down = gradients("dpo", chosen, rejected, (A, B), beta=beta)
    assert down / up == pytest.approx(-chosen / rejected, rel=1e-9)


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5])
def test_corollary_2_the_gradient_on_the_chosen_vanishes_and_that_on_the_rejected_explodes(beta):
    """-> alpha beta pi+^(-beta-1) pi-^beta and alpha beta pi+^(-beta) pi-^(beta-1), alpha = (A/B)^beta, for pi- -> 0."""
    alpha = (0.3 / 0.2) ** beta
    for rejected in (1e-300, 1e-280):
        up, down = gradients("dpo", 0.4, rejected, beta=beta)
        exact = 1 + alpha * (rejected / 0.4) ** beta  # how far from the limit it still is
        assert -up * exact == pytest.approx(alpha * beta * 0.4 ** (-beta - 1) * rejected**beta, rel=1e-9)
        assert down * exact == pytest.approx(alpha * beta * 0.4**-beta * rejected ** (beta - 1), rel=1e-9)
    near, far = (gradients("dpo", 0.4, x, beta=beta) for x in (1e-300, 1e-280))
    slopes = [math.log10(abs(y / x)) / 20 for x, y in zip(near, far)]
    assert slopes == pytest.approx([beta, beta - 1], abs=2e-3 if beta > 0.05 else 0.02)


def test_what_the_remedies_change_of_it():
    """Flex-DPO: slopes beta- and beta- - 1, its own factors. SFT-DPO: the chosen keep -gamma/pi+. IPO, SLiC: closed forms."""
    alpha, tiny = (0.3**0.4) / (0.2**0.3), 1e-250
    up, down = gradients("flex_dpo", 0.5, tiny, beta_chosen=0.4, beta_rejected=0.3)
    assert up == pytest.approx(-alpha * 0.4 * 0.5**-1.4 * tiny**0.3, rel=1e-6)
    assert down == pytest.approx(alpha * 0.3 * 0.5**-0.4 * tiny**-0.7, rel=1e-6)
    assert gradients("sft_dpo", 0.5, tiny, beta=0.3, gamma=0.1)[0] == pytest.approx(-0.1 / 0.5, rel=1e-6)
    gap = math.log(0.5 / 0.3) - math.log(0.25 / 0.2) - 5
    assert gradients("ipo", 0.5, 0.25, beta=0.1) == pytest.approx([2 * gap / 0.5, -2 * gap / 0.25], rel=1e-9)
    assert gradients("slic_hf", 0.5, 0.25, delta=5.0, nll_weight=0.1) == pytest.approx([-1.1 / 0.5, 1 / 0.25], rel=1e-9)
    assert gradients("slic_hf", 0.5, 1e-9, delta=5.0, nll_weight=0.1) == pytest.approx([-0.1 / 0.5, 0.0], rel=1e-9)


# ---- diagnostics -----------------------------------------------------------------------------------------------------------


def test_measures_of_a_made_up_run():
    watch = ThreeD(window=1)
    assert watch.observe(0, -1.0, -1.0, 0.2, weights=(1.0, 1.0))["3d/chosen_share"] == 0.5
    found = watch.observe(10, -0.8, -2.0, 0.1, weights=(0.5, 0.25))
    assert found == pytest.approx(
        {
            "3d/rate_chosen": 0.02,
            "3d/rate_rejected": -0.1,
            "3d/rate_ratio": -5.0,
            "3d/log_gradient_ratio": 1.2 + math.log(0.5),
            "3d/chosen_share": 1 / (1 + 0.5 * math.exp(1.2)),
            "3d/chosen_drop": 0.0,
            "3d/unseen": 0.1,
            "3d/unseen_change": 0.0,
        }
    )
    found = watch.observe(20, -1.0, -2.5, 0.35)
    assert (found["3d/chosen_drop"], found["3d/unseen_change"]) == pytest.approx((0.2, 0.25))


@given(PROBABILITY, PROBABILITY)
def test_the_share_is_that_of_the_loss_itself(chosen, rejected):
    up, down = gradients("dpo", chosen, rejected)
    found = ThreeD().observe(0, math.log(chosen), math.log(rejected))
    assert found["3d/chosen_share"] == pytest.approx(-up / (down - up), rel=1e-9)
    assert found["3d/log_gradient_ratio"] == pytest.approx(math.log(-down / up), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("weights", "share"), [((1.0, 0.0), 1.0), ((0.0, 1.0), 0.0)])
def test_a_side_without_weight_has_no_ratio(weights, share):
    found = ThreeD().observe(0, -1.0, -2.0, weights=weights)
    assert found["3d/chosen_share"] == share and "3d/log_gradient_ratio" not in found
    assert "3d/chosen_share" not in ThreeD().observe(0, -1.0, -2.0, weights=(0.0, 0.0))


RUNS = {  # (chosen, rejected, unseen) at steps 0, 10, 20 -> what is found
    "both rise": ([-2, -1.5, -1.2], [-2, -1.9, -1.8], [0.7, 0.6, 0.5], set()),
    "rejected fall gently": ([-2, -1.9, -1.8], [-2, -2.05, -2.1], [0.7, 0.7, 0.7], set()),
    "rejected drop": ([-2, -1.9, -1.8], [-2, -3.5, -4.6], [0.7, 0.7, 0.7], {"drop"}),
    "rejected vanish": ([-2, -1.9, -1.8], [-2, -9.0, -20.0], [0.7, 0.7, 0.7], {"drop", "unlearning"}),
    "both fall": ([-2, -1.8, -2.1], [-2, -2.1, -2.4], [0.7, 0.65, 0.7], {"degradation"}),
    "both fall, others rise": ([-2, -1.8, -2.1], [-2, -2.1, -2.4], [0.7, 0.5, 0.8], {"degradation", "dispersion"}),
    "others rise alone": ([-2, -1.9, -1.8], [-2, -2.1, -2.4], [0.5, 0.6, 0.8], set()),
}


@pytest.mark.parametrize("name", RUNS)
def test_warnings_come_with_what_they_warn_of(name):
    *columns, expected = RUNS[name]
    watch = ThreeD(window=1)
    for step, values in zip((0, 10, 20), zip(*columns)):
        watch.observe(step, *values)
    assert set(watch.warnings) == expected
    assert all(text.startswith("step ") for text in watch.warnings.values())


def test_thresholds_can_be_set():
    columns = RUNS["both fall, others rise"][:3]
    rows = [
        {"step": s, "eval_logps_mean/chosen": a, "eval_logps_mean/rejected": b, "eval_unseen_mass": u}
        for s, a, b, u in zip((0, 10, 20), *columns)
    ]
    assert set(replay(rows, window=1)[1].warnings) == {"degradation", "dispersion"}
    assert set(replay(rows, Thresholds(chosen_drop=0.5), window=1)[1].warnings) == {"dispersion"}
    assert set(replay(rows, Thresholds(chosen_drop=0.5, unseen_rise=0.4), window=1)[1].warnings) == set()
    with pytest.raises(ValueError, match="threshold chosen_share is 0; expected a positive number"):
        Thresholds(chosen_share=0)


def test_a_log_is_replayed_as_it_was_watched():
    rows = [{"step": k, "eval_logps/chosen": -1.0 - k, "eval_logps/rejected": -1.0 - 2 * k} for k in range(6)]
    watch = ThreeD()
    live = [{"step": k} | watch.observe(k, -1.0 - k, -1.0 - 2 * k) for k in range(6)]
    found, replayed = replay([{"step": 0, "loss": 1.0}, *rows])
    assert (found, replayed.warnings) == (live, watch.warnings)
    with pytest.raises(ValueError, match=r"none of the 1 rows has log-likelihoods .* eval_logps_mean/chosen"):
        replay([{"step": 1, "loss": 2.0}])


# ---- the toy ---------------------------------------------------------------------------------------------------------------

SHORT = dataclasses.replace(A, width=16, steps=60)


@pytest.fixture(scope="module")
def fitted():
    return start([0, 1], A, list(SCENARIOS))


def test_the_first_training_fits_the_scenarios_probabilities(fitted):
    found = log_probabilities(fitted, A.activation).exp().reshape(4, 2, 4, 10)
    for k, (on, off) in enumerate(SCENARIOS.values()):
        target = torch.tensor([on] * 4 + [off] * 4 + [(1 - 4 * on - 4 * off) / 2] * 2, dtype=torch.float64)
        torch.testing.assert_close(found[k], target.expand(2, 4, 10), rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", REMEDIES)
def test_networks_of_a_batch_do_not_know_of_each_other(name):
    both, rejected = [torch.cat(same) for same in zip(fresh(0, 16), fresh(1, 16))], drawn([0, 1], 1)
    together = tune(both, rejected, REMEDIES[name], SHORT)
    alone = tune([p[1:] for p in both], rejected[1:], REMEDIES[name], SHORT)
    for x, y in zip(together[1:], alone[1:]):
        np.testing.assert_allclose(x[:, 1:], y, rtol=1e-6, atol=1e-12)


def test_ogd_is_the_librarys_optimizer():
    """The toy projects many networks at once; ProjectedGradient around Adam does the same to one."""
    parameters = [p.clone().requires_grad_() for p in fresh(0, 16)]
    rejected = drawn([0], 1)
    course = tune(fresh(0, 16), rejected, REMEDIES["ogd"], SHORT)
    optimizer = ProjectedGradient(torch.optim.Adam(parameters, SHORT.rate))

    def loss(answers):
        logps = log_probabilities(parameters, SHORT.activation)[0]
        return -logps[torch.arange(4), answers].mean()

    for _ in range(SHORT.steps):
        optimizer.step(lambda: loss(torch.arange(4)), lambda: loss(rejected[0]))
    final = log_probabilities(parameters, SHORT.activation)[0].exp()
    assert final.diagonal().mean().item() == pytest.approx(course.chosen[-1, 0], rel=1e-6)
    assert final[torch.arange(4), rejected[0]].mean().item() == pytest.approx(course.rejected[-1, 0], rel=1e-6)


def test_dpo_does_not_touch_the_logits_of_unseen_answers():
    """Its gradient on the logits is zero but at the chosen and the rejected one: what moves others is shared weights."""
    logits = torch.randn(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logps = logits.log_softmax(-1)
    sides = [Completion(logps[:, k, None], torch.ones(4, 1)) for k in (0, 5)]
    LOSSES["dpo"](Pairs(*sides, torch.zeros(4), torch.zeros(4))).sum().backward()
    others = [k for k in range(10) if k not in (0, 5)]
    assert logits.grad[:, others].abs().max() < 1e-15 < logits.grad[:, 0].abs().min()


def test_the_toy_shows_drop_and_unlearning_and_that_ogd_keeps_learning(fitted):
    courses = {name: tune(fitted, drawn([0, 1], 4), REMEDIES[name], A) for name in ("dpo", "ogd")}
    dpo, ogd = courses["dpo"], courses["ogd"]
    assert (dpo.rejected[-1] < 1e-6).all() and (dpo.to_rejected[-1] > 1e3 * dpo.to_rejected[0]).all()
    assert (dpo.to_chosen[-1] < 0.1 * dpo.to_chosen[0]).all()
    first = at(dpo, "chosen", 0, 2)
    assert (first.max(0) > first[-1]).all() and (first.max(0) > 2 * first[0]).all()
    assert (ogd.chosen[-1] > 0.9).all() and (ogd.chosen[-1] >= ogd.chosen.max(0) - 0.01).all()


def test_the_study_reports_every_claim(tmp_path, monkeypatch):
    """On networks too short for any verdict."""
    monkeypatch.setattr(three_d, "A", SHORT)
    monkeypatch.setattr(three_d, "B", dataclasses.replace(three_d.B, width=8, steps=40))
    monkeypatch.setattr(three_d, "FIT_STEPS", 20)
    found = three_d.study([3, 4])
    claims.write(tmp_path, "three_d", "3D", found, {})
    assert {"does not hold"} == {claim.verdict for claim in found.claims} and len(found.claims) > 15
    record = json.loads((tmp_path / "study.json").read_text())
    assert np.array(record["numbers"]["ends"]["ogd"]["chosen"]).shape == (4, 2)
    page = (tmp_path / "study.md").read_text()
    assert "neither layer sizes nor optimizer" in page and "0 of 2 (too few" in page
    assert len(list(tmp_path.glob("*.svg"))) == 7


# ---- in a run ----------------------------------------------------------------------------------------------------------------


def test_the_unseen_mass_is_what_is_left_where_a_pair_parts(tok):
    """Against the whole distribution of the next token, from the model's own logits."""
    model, pairs = small.model(tok), small.preferences(tok)
    scores = [
        [completion_logps(model, *collate(side[i : i + 5], tok.pad_token_id)) for i in range(0, len(side), 5)]
        for side in (pairs.winners, pairs.losers)
    ]
    expected = []
    for chosen, rejected in zip(pairs.winners, pairs.losers):
        assert chosen.prompt_ids == rejected.prompt_ids and chosen.completion_ids[0] != rejected.completion_ids[0]
        next_token = model(torch.tensor([chosen.prompt_ids])).logits[0, -1].softmax(-1)
        expected.append(1 - next_token[chosen.completion_ids[0]] - next_token[rejected.completion_ids[0]])
    assert unseen_mass(pairs, *scores) == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)
    same = dataclasses.replace(pairs, losers=pairs.winners)
    assert unseen_mass(same, scores[0], scores[0]) is None


def test_a_run_logs_the_properties_and_warns_once_also_after_a_restart(tok, tmp_path, capsys, monkeypatch):
    thresholds = {"chosen_share": 0.6, "unseen_rise": 1e-6}

    def train(folder):
        task = job(tmp_path / folder, tok, "dpo", save_steps=2, eval_steps=1, warn_at=thresholds)
        Trainer(task, prepare(small.model(tok), small.MODEL, torch.device("cpu")), tok, torch.device("cpu"), False).run()

    def interrupted(self, line):
        if self.scheduler.last_epoch == 5:
            raise KeyboardInterrupt
        return ""

    train("whole")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_enough", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train("parts")
    train("parts")
    said = "".join(capsys.readouterr())
    assert said.count("of the update acts on the chosen") == 2  # once in either run
    whole, parts = lines(tmp_path / "whole"), lines(tmp_path / "parts")
    watched = [[{k: v for k, v in row.items() if k.startswith("3d/")} for row in rows] for rows in (whole, parts)]
    assert watched[0] == watched[1] and {"3d/chosen_share", "3d/unseen", "3d/rate_rejected"} <= watched[0][-1].keys()
    complete = [json.loads((tmp_path / folder / "complete.json").read_text())["warnings"] for folder in ("whole", "parts")]
    assert complete[0] == complete[1] and "unlearning" in complete[0]
    assert replay(whole, Thresholds(**thresholds))[1].warnings == complete[0]


def test_wrong_thresholds_are_named_before_anything_runs():
    config = Config(preference=dataclasses.replace(Config().preference, warn_at={"shar": 0.1}), device="cpu")
    with pytest.raises(ValueError, match=r"preference.warn_at is .*; expected positive numbers for any of .*shar"):
        SeedStudy(config, 0)
    with pytest.raises(ValueError, match=r"preference.warn_at is \{'chosen_share': -1.0\}; expected more than 0"):
        Config(preference=dataclasses.replace(Config().preference, warn_at={"chosen_share": -1.0}))


def test_the_report_shows_them(tmp_path):
    write_study(tmp_path / "run", seeds=(0, 1))
    assert write_report(tmp_path / "run", QUICK).table(TITLE) is None
    for seed in (0, 1):
        folder = tmp_path / "run" / f"seed-{seed}" / "ogd"
        rows = [row | {"3d/chosen_share": 0.5 / (1 + row["step"]), "3d/unseen": 0.1} for row in lines(folder)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        complete = json.loads((folder / "complete.json").read_text()) | {
            "warnings": {"unlearning": "step 40: 1% of the update"}
        }
        (folder / "complete.json").write_text(json.dumps(complete))
    report = write_report(tmp_path / "run", QUICK)
    table = report.table(TITLE)
    assert [row[0] for row in table.rows] == ["OGD"] and table.rows[0][-1] == "unlearning (step 40)"
    assert "three_d" in [drawing.file.stem for drawing in report.drawings]
