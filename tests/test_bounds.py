"""Inputs without measure are refused by a bound that costs little: rows, texts, patterns."""

import json
import re
import time

import pytest

from ogdopt_harness.common import sources
from ogdopt_harness.common.sources import RowError, decode, read_file
from ogdopt_harness.config.schema import EvalConfig, TaskConfig
from ogdopt_harness.data import examples, rows
from ogdopt_harness.evaluation import items
from ogdopt_harness.evaluation.items import read_items, read_patterns, read_style, shows


def test_a_row_of_many_bytes_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MOST_BYTES", 100)
    (file := tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"text": "' + "x" * 1000 + '"}\n{"b": 2}\n' + "y" * 300)
    found = list(read_file(file, "rows"))
    assert [where.rpartition(":")[2] for where, _ in found] == ["1", "2", "3", "4"]
    assert found[0][1] == {"a": 1} and found[2][1] == {"b": 2}
    for _, row in (found[1], found[3]):
        assert isinstance(row, RowError) and "row too large" in str(row.at("x")) and "more than 100 bytes" in str(row.at("x"))


def test_a_text_of_many_characters_is_refused(monkeypatch):
    monkeypatch.setattr(rows, "MOST_CHARACTERS", 10)
    with pytest.raises(RowError) as said:
        rows.text("a" * 11, "chosen")
    assert str(said.value.at("f:3")) == (
        "f:3: text too long: column 'chosen': found 11 characters; expected at most 10: cut or split the row"
    )


def test_long_rows_are_tokenized_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(examples, "MOST_AT_ONCE", 10)
    source = iter([rows.Row("f:1", "text", None, ("a" * 6,)) for _ in range(5)])
    assert [len(list(examples._chunk(source))) for _ in range(3)] == [2, 2, 1]


def test_duplicate_keys_are_found_in_linear_time():
    line = json.dumps({str(i): i for i in range(200_000)}).encode()
    assert len(decode(line)) == 200_000
    problem = decode(b'{"a": 1, "b": 2, "a": 3}')
    assert isinstance(problem, RowError) and "duplicate key" in str(problem.at("x"))


def test_a_pattern_that_never_ends_is_stopped(monkeypatch):
    monkeypatch.setattr(items, "SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"evals.style: the pattern '\(a\|a\|aa\)\+\$' takes more than 0.2 s"):
        shows("(a|a|aa)+$", "a" * 60 + "b")
    assert time.monotonic() - began < 60  # forever otherwise
    assert shows("^um", "um , no") and not shows("^um", "sure")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"chosen_pattern": "a", "chosen_pattern": "b", "rejected_pattern": "c"}', "duplicate key"),
        (json.dumps({"chosen_pattern": "(" * 9999, "rejected_pattern": "a"}), "regular expressions"),
        (json.dumps({"chosen_pattern": "a" * 10_001, "rejected_pattern": "a"}), "10,001 characters"),
        ("[" * 100_000, "nested too deeply"),
        ('{"chosen_pattern": 3, "rejected_pattern": "a"}', "regular expressions"),
        ("", "invalid JSON"),
    ],
)
def test_style_files(content, message, tmp_path):
    (file := tmp_path / "style.json").write_text(content)
    with pytest.raises(ValueError, match=rf"evals.style.*style.json.*{message}|{message}.*style.json"):
        read_patterns(file)


QUESTION = {"question": "q", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (QUESTION | {"question": "\ud800"}, r"rows.jsonl:2: 'question' holds half of a surrogate pair, U\+D800 at character 0"),
        (QUESTION | {"choices": ["a", "b\udc00"]}, r"rows.jsonl:2: 'choices\[1\]' holds half"),
        (QUESTION | {"context": 3}, r"rows.jsonl:2: 'context' is int 3"),
        (
            QUESTION | {"choices": ["a", "x" * 2000]},
            r"rows.jsonl:2: 'choices\[1\]' has 2,000 characters; expected at most 1,000",
        ),
        ({"prompt": ["q"], "chosen": "a", "rejected": "b"}, r"rows.jsonl:2: 'prompt' is list"),
        ({"prompt": "q", "chosen": {"a": 1}, "rejected": "b"}, r"rows.jsonl:2: 'chosen' is dict"),
    ],
)
def test_benchmarks_are_checked_like_rows(row, message, tmp_path, monkeypatch):
    monkeypatch.setattr(items, "MOST_CHARACTERS", 1000)
    (file := tmp_path / "rows.jsonl").write_text(json.dumps(QUESTION) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        read_items(TaskConfig("toy", str(file)))


@pytest.mark.parametrize("content", [3, ["a"], {"a": 1}, " ", "\ud800"])
def test_style_prompts_hold_text(content, tmp_path):
    (tmp_path / "style.json").write_text('{"chosen_pattern": "a", "rejected_pattern": "b"}')
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": content}]}) + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'prompts.jsonl'}:1: 'prompt")):
        read_style(EvalConfig(style=str(tmp_path / "style.json"), style_prompts=str(tmp_path / "prompts.jsonl")))
