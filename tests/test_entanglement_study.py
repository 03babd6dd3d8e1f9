"""The entanglement study: its data say what they should, its runs do what they are called, its findings are complete."""

import gzip
import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from ogdopt.projection import orthogonal
from ogdopt_harness.commands.usage import parse
from ogdopt_harness.config.recipes import RECIPES
from ogdopt_harness.studies import entanglement, entanglement_lab, sentiment_lab
from ogdopt_harness.studies.entanglement_lab import Course, Runs
from ogdopt_harness.studies.sentiment_lab import (
    HELD_OUT,
    OTHER,
    STYLES,
    Sentiment,
    generated,
    load,
    pretrained,
    score,
    write_pairs,
)
from ogdopt_harness.training.methods import METHODS, check_loss_args


@pytest.fixture(scope="module")
def data():
    return Sentiment(generated(HELD_OUT.stop))


@pytest.fixture(scope="module")
def runs(data):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"STEPS": 4, "WALK": 3, "MEASURED": 2, "PROBED": 2, "BATCH": 8}.items():
            patch.setattr(entanglement_lab, name, value)
        patch.setattr(Runs, "known", lambda self, model: [0.5, 1.0])  # so short a pretraining teaches nothing to be forgotten
        yield Runs(pretrained(data, steps=12, batch=24), data, 0)


@pytest.mark.parametrize("style", STYLES)
def test_answers_differ_in_the_label_alone_and_flipping_is_an_involution(style, data):
    for row in range(50):
        a, b = data.answer(row, style), data.answer(row, style, flipped=True)
        assert a.prompt_ids == b.prompt_ids and len(a.completion_ids) == len(b.completion_ids)
        other = [(x, y) for x, y in zip(a.completion_ids, b.completion_ids) if x != y]
        assert len(other) == 1 and len(a.completion_ids) == len(STYLES[style].split())
        words = {data.words[i].lower().strip("=.") for i in other[0]}
        assert words == set(OTHER)


def test_generated_statements_are_balanced_and_the_same_each_time():
    rows = generated(1000)
    assert rows == generated(1000) and 400 < sum(label == "positive" for _, label in rows) < 600
    assert any(" not " in text for text, _ in rows) and any("!" in text for text, _ in rows)


def test_neutral_tweets_are_left_out_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*tweet_sentiment_train.jsonl.gz; expected rows"):
        load(str(tmp_path))
    (tmp_path / "sentiment").mkdir()
    rows = [{"text": f"t{k}", "label_text": ("positive", "neutral", "negative")[k % 3]} for k in range(12_000)]

    def write(part):
        with gzip.open(tmp_path / sentiment_lab.FILE, "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in part))

    write(rows)
    found = load(str(tmp_path))
    assert len(found) == 8000 and {label for _, label in found} == set(OTHER)
    write(rows[:30])
    with pytest.raises(ValueError, match="has 20 positive or negative rows; expected 7756 or more"):
        load(str(tmp_path))


def test_rows_for_the_recipe(tmp_path):
    write_pairs(None, "short suffix", str(tmp_path))
    parts = {p.name: [json.loads(line) for line in p.read_text().splitlines()] for p in tmp_path.iterdir()}
    assert [len(parts[name]) for name in ("sft.jsonl", "pairs_train.jsonl", "pairs_test.jsonl")] == [775, 6206, 775]
    assert {row["chosen"] for row in parts["pairs_train.jsonl"]} == {"Positive sentiment.", "Negative sentiment."}
    assert all(row["chosen"] != row["rejected"] for row in parts["pairs_test.jsonl"])
    with pytest.raises(ValueError, match="style is 'x'; expected one of 'single token'"):
        write_pairs(None, "x", str(tmp_path))


def test_every_step_of_a_walk_has_the_same_length(runs):
    before = torch.cat([p.flatten() for p in runs.starts[entanglement_lab.LOSS_STYLE].parameters()])
    seen = []

    def gradient(model, pairs, rows):
        seen.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))
        (-pairs.chosen.logp.mean()).backward()

    found = runs.walk(gradient)
    steps = [(y - x).norm().item() for x, y in pairwise(seen)]
    assert torch.equal(seen[0], before) and steps == pytest.approx([entanglement_lab.LENGTH] * 2, rel=1e-3)
    assert all(a > 0 for a, _ in found.batches) and len(found.batches) == 3


@pytest.mark.parametrize("name", entanglement.NAMES)
def test_conditions_tell_the_directions_of_small_steps(name, runs, monkeypatch):
    """In steps a hundred times smaller, what Condition 2 says of a batch comes true in all but knife-edge cases."""
    monkeypatch.setattr(entanglement_lab, "LENGTH", 1e-3)
    found = runs.of_loss(name)
    assert sum(found.told) >= 2 and all(p == o for (p, o), told in zip(found.cases, found.told) if told)


def test_the_rules_and_the_others_do_what_they_are_called(runs):
    ogd = np.sum(runs.of_rule(orthogonal).batches, 0)
    assert ogd[0] > 0 and abs(ogd[1]) < 0.3 * ogd[0]
    for course in (runs.of_pairs(), runs.of_sparse()):
        a, b = np.sum(course.batches, 0)
        assert a > b and course.changes[-1] != (0.0, 0.0)


def test_dpo_by_style(runs):
    course, angles, model = runs.tuned_by_dpo("short suffix")
    assert len(course.changes) == 3 and course.changes[0] == (0.0, 0.0) and len(angles) == 2
    assert score(model, [runs.data.answer(0, "short suffix")]).logp.isfinite().all()
    assert runs.tokens("long suffix").shape == (6, 6)


def test_findings_of_courses_made_up():
    """Every claim has one verdict a seed, and a sign that follows its numbers."""
    labels = [METHODS[name].label for name in entanglement.NAMES]
    course = lambda a, b: Course([(0.0, 0.0), (a, b)], False, [(a, b)] * 3, [True] * 3, [(1.0, 1.0)] * 3)  # noqa: E731
    styles = [{style: course(0.5 - k, -2.0) for k, style in enumerate(STYLES)} for _ in range(2)]
    angles = [{style: [k - 0.5, 0.0] for k, style in enumerate(STYLES)} for _ in range(2)]
    maps = [{style: np.where(np.eye(9) * (np.arange(9) == 3), -1.0, 1.0) for style in STYLES} for _ in range(2)]
    found = entanglement.style_claims(styles, angles, maps)
    assert all(claim.holds == [True, True] for claim in found), [claim.text for claim in found if not all(claim.holds)]
    losses = [{label: course(-1.0, -2.0) for label in labels} for _ in range(2)]
    verdicts = {claim.text.split(":")[0]: all(claim.holds) for claim in entanglement.loss_claims(losses)}
    assert verdicts["DPO"] and verdicts["IPO"] and not verdicts["CPO"] and not verdicts["SPPO"]
    assert entanglement.course_table("All", losses, told=True).rows[0][-1] == "1 1"


@pytest.mark.parametrize("name", ["mistral_7b_tldr", "llama3_8b_tldr", "mistral_7b_ultrafeedback", "llama3_8b_ultrafeedback"])
def test_recipes_are_the_papers(name):
    """SPEC 4.7: LoRA r=64, rate 5e-6, effective batch 16, warm-up 0.1, linear, lengths 512 and 128, beta 0.1."""
    config = parse(["--config", str(RECIPES / f"{name}.yaml")])
    lora, stage = config.model.lora, config.preference
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (64, 128, 0.05, ["q_proj", "k_proj", "v_proj"])
    assert (stage.optimizer, stage.learning_rate, stage.train_batch_size, stage.warmup_ratio) == ("AdamW", 5e-6, 16, 0.1)
    assert (stage.lr_scheduler_type, stage.num_train_epochs, stage.max_grad_norm, stage.beta) == ("linear", 1, 1.0, [0.1])
    assert (stage.data.max_length, stage.data.max_prompt_length, stage.data.max_eval_rows) == (512, 128, 2048)
    check_loss_args(stage.loss_args)
    assert bool(config.sft.data.train) == ("ultrafeedback" in name)
