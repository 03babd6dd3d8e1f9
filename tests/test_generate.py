"""Answers and their files: greedy ones, kept as they come, in exactly the layouts that the official judges read."""

import gzip
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from ogdopt_harness.commands import generate
from ogdopt_harness.common.journal import Journal
from ogdopt_harness.evaluation.answer_files import FORMATS, key_of, marks, read_answers, read_prompts
from tests import limits
from tests.hub import write_rows
from tests.test_lm_evals import NEW, chat_ids, export, tiny_model, word_tokenizer

ROOT = Path(__file__).parent.parent
ARENA = Path(__file__).parents[2] / "shared" / "data" / "eval_prompts" / "arena_hard_v0.1_test.jsonl.gz"
TALK = [
    {"role": "user", "content": "where does mila live ?"},
    {"role": "assistant", "content": "in oslo"},
    {"role": "user", "content": "be kind"},
]
ROWS = {
    "arena_hard": [{"uid": f"q{i}", "category": "hard", "prompt": "where " * (i + 1)} for i in range(7)],
    "arena_hard_2024": [{"question_id": f"q{i}", "turns": [{"content": "where " * (i + 1)}]} for i in range(7)],
    "wildbench": [
        {"session_id": "w0", "primary_tag": "Math", "conversation_input": TALK},
        {"session_id": "w1", "primary_tag": "Coding", "conversation_input": TALK[:1]},
    ],
    "alpaca_eval": [{"instruction": "where ?", "dataset": "koala"}, {"instruction": "be kind", "dataset": "vicuna"}],
    "prompts": [{"prompt": "where ?"}, {"id": 7, "prompt": TALK}],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "ogd" / "model" / "epoch-2"
    tokenizer = word_tokenizer(NEW)
    made = tiny_model(tokenizer, seed=3)
    made.config.max_position_embeddings = 64
    return export(made, tokenizer, folder), made, tokenizer


def answered(model, prompts, folder, **options):
    settings = dict(output_dir=str(folder), max_new_tokens=6, batch_size=3, token_counter="model", device="cpu")
    return generate.generate(str(model[0]), str(prompts), generate.GenerateConfig(**(settings | options)))


def one_by_one(made, tokenizer, messages, new_tokens=6):
    """Token ids of the greedy reply, one sequence and one token at a time."""
    prompt = chat_ids(tokenizer, *((m["role"], m["content"]) for m in messages), add_generation_prompt=True)
    ids = list(prompt)
    for _ in range(new_tokens):
        ids.append(int(made(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("format", FORMATS)
def test_answers_are_the_models_own_greedy_ones_in_the_benchmarks_order(model, tmp_path, format, capsys):
    _, made, tokenizer = model
    prompts = write_rows(tmp_path / "prompts.jsonl", ROWS[format])
    file = answered(model, prompts, tmp_path / "out", format=format)
    kept = Journal(tmp_path / "out" / "answers.jsonl")
    asked = read_prompts(prompts, format)
    for prompt in asked:
        ids = one_by_one(made, tokenizer, prompt.messages)
        row = kept[prompt.id]
        assert row["output"] == tokenizer.decode(ids, skip_special_tokens=True).strip() and row["n_tokens"] == len(ids)
        assert row["finish_reason"] == ("stop" if ids[-1] == tokenizer.eos_token_id else "length")
    assert f"{len(asked)} answers" in capsys.readouterr().out
    found = read_answers(file) if format != "arena_hard_2024" else None
    if found is not None:  # its file does not hold the prompts
        assert [found[key_of(p.messages)].output for p in asked] == [kept[p.id]["output"] for p in asked]


def test_the_official_layouts(model, tmp_path):
    """Every key that the official readers read, in their order (EVALUATION of each in its repository)."""
    files = {}
    for format, rows in ROWS.items():
        prompts = write_rows(tmp_path / f"{format}.jsonl", rows)
        files[format] = answered(model, prompts, tmp_path / format, format=format, name="ours")
    lines = {f: [json.loads(line) for line in files[f].read_text().splitlines()] for f in ("arena_hard", "arena_hard_2024")}
    for row, asked in zip(lines["arena_hard"], ROWS["arena_hard"], strict=True):
        assert list(row) == ["uid", "ans_id", "model", "messages", "tstamp", "metadata"] and row["uid"] == asked["uid"]
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] and row["model"] == "ours"
        assert list(row["messages"][1]["content"]) == ["answer"]
        assert list(row["metadata"]) == ["token_len", "header_count", "list_count", "bold_count"]
    for row, asked in zip(lines["arena_hard_2024"], ROWS["arena_hard_2024"], strict=True):
        assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp", "conv_metadata"]
        assert row["question_id"] == asked["question_id"] and list(row["choices"][0]) == ["index", "turns"]
        assert row["choices"][0]["turns"][0]["token_len"] == row["conv_metadata"]["token_len"]
    assert len({row["ans_id"] for row in lines["arena_hard"]}) == 7
    wild = json.loads(files["wildbench"].read_text())
    keys = "session_id chat_history model_input output generator configs dataset primary_tag".split()
    assert [list(row) for row in wild] == [keys] * 2 and [row["session_id"] for row in wild] == ["w0", "w1"]
    assert wild[0]["chat_history"] == [turn["content"] for turn in TALK] and wild[0]["model_input"].startswith(
        "<s>[INST] where"
    )
    assert isinstance(wild[0]["output"], list) and wild[0]["primary_tag"] == "Math" and wild[0]["dataset"] == "wild_bench"
    assert set(wild[0]["configs"]) == {"engine", "repetition_penalty", "temperature", "top_p", "max_tokens"}
    alpaca = json.loads(files["alpaca_eval"].read_text())
    assert [list(row) for row in alpaca] == [["instruction", "output", "generator", "dataset"]] * 2
    assert files["arena_hard"] == tmp_path / "arena_hard" / "arena_hard" / "ours.jsonl"


def test_markdown_is_counted_outside_of_code():
    text = "# a\n## b\n### c d\n1. x\n 2. y\n- z\n* w\n**bold** and __too__\n```\n# no\n- no\n**no**\n```"
    assert marks(text, 9) == {
        "token_len": 9,
        "header_count": {"h1": 1, "h2": 1, "h3": 1, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 2, "unordered": 2},
        "bold_count": {"**": 1, "__": 1},
    }


def test_an_interrupted_generation_goes_on_and_ends_the_same(model, tmp_path, monkeypatch):
    prompts = write_rows(tmp_path / "prompts.jsonl", ROWS["arena_hard"])
    whole = answered(model, prompts, tmp_path / "whole", format="arena_hard")
    stock, calls = generate.greedy, []

    def counted(*arguments):
        calls.append(len(arguments[2]))
        if stop := calls == [3, 3, 1] and not broken:
            broken.append(stop)
            raise KeyboardInterrupt
        return stock(*arguments)

    broken: list[bool] = []
    monkeypatch.setattr(generate, "greedy", counted)
    with pytest.raises(KeyboardInterrupt):
        answered(model, prompts, tmp_path / "again", format="arena_hard")
    assert len(Journal(tmp_path / "again" / "answers.jsonl")) == 6
    again = answered(model, prompts, tmp_path / "again", format="arena_hard")
    assert calls == [3, 3, 1, 1]  # the second time only what was missing
    rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in (whole, again)]
    first, second = ([{**row, "tstamp": 0} for row in one] for one in rows)
    assert first == second


def test_answers_made_otherwise_are_not_mixed(model, tmp_path):
    prompts = write_rows(tmp_path / "prompts.jsonl", ROWS["prompts"])
    answered(model, prompts, tmp_path / "out")
    answered(model, prompts, tmp_path / "out", batch_size=1)
    with pytest.raises(ValueError, match="max_new_tokens was 6 and is 5"):
        answered(model, prompts, tmp_path / "out", max_new_tokens=5)
    write_rows(tmp_path / "prompts.jsonl", [ROWS["prompts"][0], {"id": 7, "prompt": "be kind"}])
    with pytest.raises(ValueError, match="was made with other settings: prompts_sha256 was"):
        answered(model, prompts, tmp_path / "out")


def test_two_processes_answer_as_one_does(model, tmp_path):
    """The command itself under torchrun."""
    prompts = write_rows(tmp_path / "prompts.jsonl", ROWS["arena_hard"])
    alone = answered(model, prompts, tmp_path / "alone", format="arena_hard", name="ours")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words += [str(ROOT / "harness" / "run.py"), "generate", str(model[0]), prompts, "--format=arena_hard", "--name=ours"]
    words += ["--output_dir=two", "--max_new_tokens=6", "--batch_size=3", "--token_counter=model", "--device=cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=limits.PROCESS)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert ended.stdout.count("Written:") == 1 and len(list((tmp_path / "two").glob("answers.jsonl*"))) == 2
    both = [(tmp_path / "two" / "arena_hard" / "ours.jsonl"), alone]
    first, second = ([{**json.loads(x), "tstamp": 0} for x in file.read_text().splitlines()] for file in both)
    assert first == second


def test_an_answer_has_no_more_room_than_the_model_reads(model, tmp_path, capsys):
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "where " * 50}, {"prompt": "be kind"}])
    answered(model, prompts, tmp_path / "out", max_new_tokens=4096)
    long, short = (Journal(tmp_path / "out" / "answers.jsonl")[p.id] for p in read_prompts(prompts, "prompts"))
    assert long["n_tokens"] <= 64 - 53 < 40 and short["n_tokens"] <= 64 - 5
    if "length" in (long["finish_reason"], short["finish_reason"]):
        assert "did not end within 4096 tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has 73 tokens, but the model reads 64"):
        answered(model, write_rows(tmp_path / "p.jsonl", [{"prompt": "where " * 70}]), tmp_path / "o")


def test_vllm_gets_the_same_tokens_and_limits(model, tmp_path, monkeypatch):
    """Against a stand-in for the library: what it is called with, and that its answers are used."""
    asked = []

    class LLM:
        def __init__(self, **options):
            assert options["model"] == str(model[0])

        def generate(self, prompts, limits):
            asked.extend(zip(prompts, limits, strict=True))
            out = types.SimpleNamespace(token_ids=[model[2].convert_tokens_to_ids("oslo"), 2], finish_reason="stop")
            return [types.SimpleNamespace(outputs=[out]) for _ in prompts]

    stand_in = types.ModuleType("vllm")
    stand_in.LLM, stand_in.SamplingParams = LLM, lambda **options: options
    stand_in.__spec__ = types.SimpleNamespace(name="vllm")
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    prompts = write_rows(tmp_path / "prompts.jsonl", ROWS["prompts"])
    file = answered(model, prompts, tmp_path / "out", backend="vllm")
    assert {answer.output for answer in read_answers(file).values()} == {"oslo"}
    given = [one["prompt_token_ids"] for one, _ in asked]
    talk = chat_ids(model[2], *((m["role"], m["content"]) for m in TALK), add_generation_prompt=True)
    assert given[0] == talk and all(limit == {"temperature": 0.0, "max_tokens": 6} for _, limit in asked)


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("arena_hard", {"prompt": "where ?"}, "prompts.jsonl:2: no 'uid'"),
        ("arena_hard", {"uid": "x", "question": "where ?"}, "prompts.jsonl:2: found columns uid, question; expected a prompt"),
        ("arena_hard_2024", {"question_id": "x", "turns": []}, "prompts.jsonl:2: found columns"),
        ("wildbench", {"session_id": "x", "conversation_input": TALK[:2]}, "of which the user's is last"),
        ("prompts", {"prompt": " "}, "expected a text, or messages"),
        ("prompts", {"prompt": 3}, "prompts.jsonl:2: the prompt is int 3"),
        ("prompts", [1], "prompts.jsonl:2: found list"),
        ("alpaca_eval", {"instruction": "where ?"}, "appears a second time"),
    ],
)
def test_a_prompt_that_is_none_is_named(tmp_path, format, row, message):
    path = write_rows(tmp_path / "prompts.jsonl", [ROWS[format][0], row])
    with pytest.raises(ValueError, match=message):
        read_prompts(path, format)


def test_tiktoken_counts_arena_hards_tokens_or_its_absence_is_named(model, tmp_path, monkeypatch):
    prompts = write_rows(tmp_path / "prompts.jsonl", ROWS["arena_hard"][:2])
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ValueError, match=r"pip install tiktoken .* --token_counter model"):
        answered(model, prompts, tmp_path / "out", format="arena_hard", token_counter="tiktoken")
    stand_in = types.ModuleType("tiktoken")
    names = []
    encoding = types.SimpleNamespace(encode=lambda text, disallowed_special: [0] * 17)
    stand_in.encoding_for_model = lambda name: names.append(name) or encoding
    monkeypatch.setitem(sys.modules, "tiktoken", stand_in)
    file = answered(model, prompts, tmp_path / "out", format="arena_hard", token_counter="tiktoken")
    assert json.loads(file.read_text().splitlines()[0])["metadata"]["token_len"] == 17 and names == ["gpt-4o"]


def test_the_official_prompts_of_arena_hard_are_read(tmp_path):
    if not ARENA.is_file():
        pytest.skip(f"no {ARENA}")
    with gzip.open(ARENA, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    prompts = read_prompts(str(ARENA), "prompts")
    assert [p.id for p in prompts] == [row["id"] for row in rows] and prompts[0].messages[0]["content"] == rows[0]["prompt"]
