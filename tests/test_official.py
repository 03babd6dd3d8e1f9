"""The paper's eight benchmarks through lm-eval's official definitions, on real rows; and evaluations that were interrupted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ogdopt_harness.analysis.study_reader import Evaluation
from ogdopt_harness.cli import command
from ogdopt_harness.commands.usage import parse
from ogdopt_harness.config.schema import EvalConfig, TaskConfig
from ogdopt_harness.evaluation.lm import EvalLM
from ogdopt_harness.evaluation.official import OFFICIAL, official_tasks
from ogdopt_harness.evaluation.suite import evaluate
from tests import limits
from tests.hub import BENCHMARKS, EIGHT, lay_out_eight, rows_of, write_rows
from tests.test_lm_evals import NEW, bpe_tokenizer, chat_ids, expected, export, tiny_model, toy_rows

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A model, and real rows of all eight as the hub lays them out: MMLU with its 57 subjects."""
    if not BENCHMARKS.is_dir():
        pytest.skip(f"no real benchmark rows in {BENCHMARKS}")
    folder = tmp_path_factory.mktemp("hub")
    tokenizer = bpe_tokenizer("bytes", NEW)
    export(tiny_model(tokenizer), tokenizer, folder / "model")
    lay_out_eight(folder / "data")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        official_tasks.cache_clear()
        yield folder
        official_tasks.cache_clear()


def asked(folder, names, output="out.json", **options):
    config = EvalConfig([], names, str(folder / "data"), limit=4, batch_size=32, **options)
    return evaluate(folder / "model", config, folder / output, run="sft", epoch=1, seed_dir=None, device="cpu", progress=False)


@pytest.mark.filterwarnings("ignore:.*lost their beginning")
def test_all_eight_with_their_own_prompts_metrics_and_strata(hub, monkeypatch):
    assert parse(["--config", "tax"]).evals.lm_eval_tasks == EIGHT == list(OFFICIAL)
    prompts = []
    stock = EvalLM.apply_chat_template
    monkeypatch.setattr(EvalLM, "apply_chat_template", lambda *a, **k: prompts.append(stock(*a, **k)) or prompts[-1])
    found = asked(hub, EIGHT)
    ways = {name: task["ways"]["direct"] for name, task in found["tasks"].items()}
    assert {name: (way["metric"], way["n"], round(way["chance"], 2)) for name, way in ways.items()} == {
        "piqa": ("acc_norm", 4, 0.5),
        "social_iqa": ("acc", 4, 0.33),
        "hellaswag": ("acc_norm", 4, 0.25),
        "arc_easy": ("acc", 4, 0.25),
        "arc_challenge": ("acc_norm", 4, 0.25),
        "mmlu": ("acc", 228, 0.25),
        "gsm8k": ("exact_match,flexible-extract", 4, 0.0),
        "boolq": ("acc", 4, 0.5),
    }
    assert len(set(ways["mmlu"]["strata"])) == len(ways["mmlu"]["strata_names"]) == 57
    for way in ways.values():
        assert len(set(way["doc_hashes"])) == len(way["outcomes"]) == way["n"]
        assert ("acc" in way) == (way["metric"] == "acc_norm")
    assert found["settings"]["apply_chat_template"] is True and set(found["versions"]) >= {"lm_eval", "transformers"}
    assert len(prompts) == 7 * 4 + 228 and all(p.startswith("<s>[INST] ") and p.endswith("[/INST]") for p in prompts)
    (goal,) = rows_of("piqa", 1)
    assert f"<s>[INST] Question: {goal['question']}\nAnswer:[/INST]" in prompts  # zero-shot: nothing before the question
    assert sum("[INST] The following are multiple choice questions (with answers) about" in p for p in prompts) == 228
    read = Evaluation.read(hub / "out.json")
    assert read.ways == ["direct", "acc"] and read.tasks["piqa"]["acc"].metric == "acc"
    assert read.tasks["mmlu"]["acc"] is read.tasks["mmlu"]["direct"]  # what is plain accuracy already
    assert not list(hub.glob("*.partial*"))


@pytest.mark.filterwarnings("ignore:.*lost their beginning")
@pytest.mark.parametrize("templated", [True, False])
def test_boolq_scores_as_first_principles_say(hub, templated):
    """The official prompt under the chat template, or plain; a system prompt opens the user's turn."""
    system = "Answer in one word ."
    found = asked(hub, ["boolq"], apply_chat_template=templated, system_instruction=system)
    tokenizer = bpe_tokenizer("bytes", NEW)
    model = tiny_model(tokenizer)
    way = found["tasks"]["boolq"]["ways"]["direct"]
    checked = 0
    for row, outcome, margin in zip(rows_of("boolq", 4), way["outcomes"], way["margins"], strict=True):
        turn = ("user", f"{system}\n\n{row['context']}\nQuestion: {row['question']}?\nAnswer:")
        if templated:
            prompt = chat_ids(tokenizer, turn, add_generation_prompt=True)
            replies = [chat_ids(tokenizer, turn, ("assistant", choice))[len(prompt) : -1] for choice in ("no", "yes")]
        else:
            prompt = tokenizer(turn[1], add_special_tokens=False).input_ids
            replies = [tokenizer(f" {choice}", add_special_tokens=False).input_ids for choice in ("no", "yes")]
        if len(prompt) < 1000:  # longer ones lose their beginning, with a warning
            assert (outcome, margin) == pytest.approx(expected(model, [prompt] * 2, replies, row["answer"]), abs=1e-4)
            checked += 1
    assert checked >= 2 and found["settings"]["system_instruction"] == system


@pytest.mark.filterwarnings("ignore:.*lost their beginning")
def test_a_column_that_is_missing_is_named(hub, tmp_path):
    lay_out_eight(tmp_path / "data", n=3, subjects=1)
    rows = [{k: v for k, v in row.items() if k != "context"} for row in rows_of("hellaswag", 3)]  # not the hub's columns
    write_rows(tmp_path / "data/Rowan/hellaswag/default-validation.jsonl", rows)
    config = EvalConfig([], ["hellaswag"], str(tmp_path / "data"))
    where = dict(run="sft", epoch=1, seed_dir=None, device="cpu", progress=False)
    with pytest.raises(ValueError, match=r"evals.lm_eval_tasks: cannot load hellaswag"):
        evaluate(hub / "model", config, tmp_path / "never.json", **where)


# ---------------------------------------------------------------------------------------------------------------- interruptions


@pytest.fixture
def toy(tmp_path):
    tokenizer = bpe_tokenizer("bytes", NEW)
    export(tiny_model(tokenizer), tokenizer, tmp_path / "model")
    path = write_rows(tmp_path / "toy.jsonl", toy_rows(40))
    return tmp_path, EvalConfig([TaskConfig("toy", path, ask=["direct", "generate"])], batch_size=2, max_new_tokens=4)


def evaluated(folder, config, name="epoch-1.json"):
    return evaluate(folder / "model", config, folder / name, run="sft", epoch=1, seed_dir=None, device="cpu", progress=False)


@pytest.mark.parametrize("method", ["_model_call", "_reply"])
def test_an_interrupted_evaluation_goes_on_and_ends_the_same(toy, monkeypatch, method):
    folder, config = toy
    stock = getattr(EvalLM, method)
    calls = []

    def counted(*arguments, **options):
        calls.append(1)
        return stock(*arguments, **options)

    monkeypatch.setattr(EvalLM, method, counted)
    whole = evaluated(folder, config, "whole.json")
    total = len(calls)

    def breaks(*arguments, **options):
        if len(calls) == total // 2:
            raise KeyboardInterrupt
        return counted(*arguments, **options)

    calls.clear()
    monkeypatch.setattr(EvalLM, method, breaks)
    with pytest.raises(KeyboardInterrupt):
        evaluated(folder, config)
    (journal,) = folder.glob("epoch-1.partial-*.jsonl")
    assert journal.read_text().count("\n") > 10 and not (folder / "epoch-1.json").exists()
    with journal.open("a") as file:
        file.write('{"id": "torn')  # killed while it wrote
    calls.clear()
    monkeypatch.setattr(EvalLM, method, counted)
    again = evaluated(folder, config)
    assert 0 < len(calls) < total and again["tasks"] == whole["tasks"] and not list(folder.glob("*.partial-*"))


def test_another_model_or_setting_takes_nothing_from_the_journal(toy, monkeypatch):
    folder, config = toy
    with monkeypatch.context() as patched:
        patched.setattr(EvalLM, "_reply", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            evaluated(folder, config)
    (journal,) = folder.glob("epoch-1.partial-*.jsonl")
    before = journal.read_bytes()
    tokenizer = bpe_tokenizer("bytes", NEW)
    export(tiny_model(tokenizer, seed=1), tokenizer, folder / "model")
    fresh = evaluated(folder, config)
    assert journal.read_bytes() == before  # of the other model: left alone
    assert fresh["tasks"] == evaluated(folder, config, "clean.json")["tasks"]


def test_a_model_spread_over_devices_answers_the_same(toy):
    pytest.importorskip("accelerate")
    folder, config = toy
    alone = evaluated(folder, config)
    spread = EvalConfig(config.tasks, batch_size=2, max_new_tokens=4, device_map="auto")
    assert evaluated(folder, spread, "spread.json")["tasks"] == alone["tasks"]


def test_two_processes_answer_as_one_does(toy):
    """The command itself under torchrun: the same outcomes, margins and replies, bit for bit."""
    folder, _ = toy
    tokenizer = bpe_tokenizer("bytes", NEW)
    export(tiny_model(tokenizer, seed=1), tokenizer, folder / "tuned")
    tasks = [{"name": "toy", "path": str(folder / "toy.jsonl"), "ask": ["direct", "generate"]}]
    options = ["--evals.tasks", json.dumps(tasks), "--evals.lm_eval_tasks", "[]", "--evals.batch_size=2", "--device=cpu"]
    options += ["--evals.max_new_tokens=4", "--report.samples=200"]
    models = [str(folder / "model"), str(folder / "tuned")]
    command(["tax", *models, *options, "--study.output_dir", str(folder / "one")])
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "harness/run.py")]
    words += ["tax", *models, *options, "--study.output_dir", str(folder / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=limits.PROCESS)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "tuned has a TAX of" in ended.stdout and ended.stdout.count("Written:") == 1
    one, two = (sorted((folder / out).glob("*/evals/*")) for out in ("one", "two"))
    assert [p.name for p in one] == [p.name for p in two] == ["epoch-1.json"] * 2  # and no journal is left
    for ours, theirs in zip(one, two, strict=True):
        assert json.loads(ours.read_text())["tasks"] == json.loads(theirs.read_text())["tasks"]
