"""The miniature world: determinism, formats, and what is kept apart."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from ogdopt_harness.config.schema import WorldConfig
from ogdopt_harness.data.lexicon import FEELINGS, KINDS, SLOTS, TOOLS
from ogdopt_harness.data.world import (
    CLOSERS,
    OPENERS,
    PAIR_MIX,
    YESNO_INFERRED,
    YESNO_TESTED,
    make_world,
    style_patterns,
)

CONFIG = WorldConfig(seed=3, sft_conversations=2000, preference_pairs=300, held_out_pairs=60, items=64)
FAMILIES = ("facts", "kinds", "tools", "feelings", "sums", "reading", "yesno")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def texts(row: dict[str, Any]) -> list[str]:
    return [row["text"]] if "text" in row else [message["content"] for message in row["messages"]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "data"
    make_world(CONFIG, folder)
    return folder


@pytest.fixture(scope="module")
def sft(world: Path) -> list[str]:
    return [text for name in ("sft_train", "sft_eval") for row in read(world / f"{name}.jsonl") for text in texts(row)]


@pytest.fixture(scope="module")
def benchmarks(world: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: read(world / "benchmarks" / f"{name}.jsonl") for name in FAMILIES}


def test_same_configuration_gives_the_same_bytes(world: Path, tmp_path: Path) -> None:
    make_world(CONFIG, tmp_path / "again")
    make_world(dataclasses.replace(CONFIG, seed=4), tmp_path / "other")
    assert contents(tmp_path / "again") == contents(world)
    assert contents(tmp_path / "other")["sft_train.jsonl"] != contents(world)["sft_train.jsonl"]


def test_report_counts_the_rows_and_nothing_else_is_left(world: Path, tmp_path: Path) -> None:
    report = make_world(CONFIG, tmp_path / "deep" / "data")
    assert report["files"] == {name: len(read(world / name)) for name in report["files"]}
    assert report["files"]["pairs_train.jsonl"] == 300
    assert report["files"]["pairs_eval.jsonl"] == 60
    assert sorted(contents(world)) == sorted([*report["files"], "style.json", "world.json"])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["data"]


def test_a_finished_world_is_left_alone_and_another_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    report = make_world(CONFIG, folder)
    before = (folder / "sft_train.jsonl").stat().st_mtime_ns
    assert make_world(CONFIG, folder) == report
    assert (folder / "sft_train.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="does not hold this world"):
        make_world(dataclasses.replace(CONFIG, items=8), folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="does not hold this world"):
        make_world(CONFIG, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


def test_a_failure_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, value: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("ogdopt_harness.data.world._write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        make_world(CONFIG, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_rows_have_the_documented_form(world: Path, benchmarks: dict[str, list[dict[str, Any]]]) -> None:
    for row in read(world / "sft_train.jsonl"):
        assert set(row) in ({"text"}, {"messages"})
        assert "text" in row or [message["role"] for message in row["messages"]] == ["user", "assistant"]
    for row in read(world / "pairs_train.jsonl"):
        assert {key: [message["role"] for message in row[key]] for key in row} == {
            "prompt": ["user"],
            "chosen": ["assistant"],
            "rejected": ["assistant"],
        }
    for name, rows in benchmarks.items():
        assert 32 <= len(rows) <= CONFIG.items, name
        assert len({row["id"] for row in rows}) == len({row["question"] for row in rows}) == len(rows)
        for row in rows:
            assert set(row) == {"id", "question", "choices", "answer", "cloze"}
            assert len(set(row["choices"])) == len(row["choices"]) == (2 if name == "yesno" else 4)
            assert 0 <= row["answer"] < len(row["choices"])
            assert all(text == " ".join(text.split()) for text in (row["question"], row["cloze"], *row["choices"]))


def test_all_styles_of_answers_are_in_the_supervised_text(world: Path) -> None:
    patterns = style_patterns()
    answers = [row["messages"][1]["content"] for row in read(world / "sft_train.jsonl") if "messages" in row]
    for pattern in patterns.values():
        assert 0.1 < sum(bool(re.search(pattern, answer)) for answer in answers) / len(answers) < 0.2
    assert 0.4 < sum(len(answer.split()) <= 2 for answer in answers) / len(answers) < 0.6


def test_questions_of_benchmarks_are_held_out(sft: list[str], benchmarks: dict[str, list[dict[str, Any]]]) -> None:
    asked = set(sft)
    for name, rows in benchmarks.items():
        assert not [row["question"] for row in rows if row["question"] in asked], name


def test_held_out_sums_occur_nowhere(sft: list[str], benchmarks: dict[str, list[dict[str, Any]]]) -> None:
    text = "\n".join(sft)
    for row in benchmarks["sums"]:
        problem = row["cloze"].removesuffix(" is")
        assert problem not in text
        a, b = (int(side.replace(" ", "")) for side in problem.split("plus"))
        assert int(row["choices"][row["answer"]].replace(" ", "")) == a + b


def test_reading_answers_stand_in_fresh_passages(world: Path, benchmarks: dict[str, list[dict[str, Any]]]) -> None:
    trained = {text for row in read(world / "sft_train.jsonl") for text in texts(row)}
    for row in benchmarks["reading"]:
        passage, asked = row["question"].rsplit(" . ", 1)
        assert row["choices"][row["answer"]] in passage.split()
        assert row["choices"][row["answer"]] not in asked.split()
        assert f"{row['cloze']} {row['choices'][row['answer']]} ." not in trained
    held_out = [row["messages"][0]["content"] for row in read(world / "sft_eval.jsonl") if "messages" in row]
    passages = [text for text in held_out if " . " in text and (" had the " in text or " was with " in text)]
    assert passages
    assert not trained & set(passages)


def test_cloze_statements_occur_as_plain_text(world: Path, benchmarks: dict[str, list[dict[str, Any]]]) -> None:
    """All but the yes/no answers that are there to be inferred: a quarter of theirs."""
    plain = {row["text"] for row in read(world / "sft_train.jsonl") if "text" in row}
    for name in set(FAMILIES) - {"sums", "reading"}:
        missing = [row for row in benchmarks[name] if f"{row['cloze']} {row['choices'][row['answer']]} ." not in plain]
        assert len(missing) <= (8 * YESNO_INFERRED if name == "yesno" else 0)


def test_inferred_answers_are_never_trained_on(tmp_path: Path) -> None:
    config = WorldConfig(sft_conversations=1000)
    make_world(config, tmp_path / "data")
    trained = " ".join(" ".join(texts(row)) for row in read(tmp_path / "data" / "sft_train.jsonl"))
    asked = [row["cloze"].removesuffix(" the answer is") for row in read(tmp_path / "data" / "benchmarks" / "yesno.jsonl")]
    assert len(asked) == 8 * YESNO_TESTED and sum(question not in trained for question in asked) == 8 * YESNO_INFERRED


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("people", (4, 48))
def test_every_word_of_a_benchmark_or_pair_is_in_the_training_text(tmp_path: Path, seed: int, people: int) -> None:
    make_world(WorldConfig(seed=seed, people=people, sft_conversations=1000), tmp_path / "data")
    known = {word for row in read(tmp_path / "data" / "sft_train.jsonl") for text in texts(row) for word in text.split()}
    for path in (tmp_path / "data" / "benchmarks").iterdir():
        for row in read(path):
            assert set(" ".join((row["question"], row["cloze"], *row["choices"])).split()) <= known
    for name in ("pairs_train", "pairs_eval"):
        for row in read(tmp_path / "data" / f"{name}.jsonl"):
            assert {word for side in row.values() for word in side[0]["content"].split()} <= known


@pytest.mark.parametrize("name", ("pairs_train", "pairs_eval"))
def test_pairs_tell_the_same_fact_in_two_styles(world: Path, name: str) -> None:
    patterns = json.loads((world / "style.json").read_text())
    assert patterns == style_patterns()
    for row in read(world / f"{name}.jsonl"):
        sides = {}
        for side, other, style in (("chosen", "rejected", "friendly"), ("rejected", "chosen", "curt")):
            text = row[side][0]["content"]
            assert re.search(patterns[f"{side}_pattern"], text)
            assert not re.search(patterns[f"{other}_pattern"], text)
            opener = next(opener for opener in OPENERS[style] if text.startswith(f"{opener} "))
            closer = next(closer for closer in CLOSERS[style] if text.endswith(f" {closer}"))
            sides[side] = text.removeprefix(opener).removesuffix(closer)
        assert sides["chosen"] == sides["rejected"]
        assert row["chosen"][0]["content"].split()[0] != row["rejected"][0]["content"].split()[0]


def test_half_of_everything_is_never_in_pairs(world: Path, benchmarks: dict[str, list[dict[str, Any]]]) -> None:
    def facts(name: str) -> set[str]:
        return {re.split(r" \. | , ", row["chosen"][0]["content"])[1] for row in read(world / f"{name}.jsonl")}

    trained, held_out = facts("pairs_train"), facts("pairs_eval")
    assert not trained & held_out
    prompts = [row["prompt"] for row in read(world / "style_prompts.jsonl")]
    assert len(set(prompts)) == len(prompts) == CONFIG.items
    assert not set(prompts) & {row["prompt"][0]["content"] for row in read(world / "pairs_train.jsonl")}
    people = {row["id"].split("-")[1] for row in benchmarks["facts"]}
    in_pairs = {word for fact in trained for word in fact.split()} & people
    assert 0 < len(in_pairs) < len(people)
    assert not [prompt for prompt in prompts if set(prompt.split()) & in_pairs]
    assert not [fact for fact in held_out if set(fact.split()) & in_pairs]


def test_families_outside_the_pair_mix_never_occur_in_pairs(world: Path) -> None:
    text = "\n".join(row["prompt"][0]["content"] for row in read(world / "pairs_train.jsonl"))
    assert set(PAIR_MIX) == {"facts", "kinds", "tools"}
    assert not re.search(r"feel|plus|had|was with|yes or no|is it so", text)


def test_word_lists_do_not_contradict_themselves() -> None:
    for table in (KINDS, SLOTS):
        words = list(itertools.chain.from_iterable(joined.split() for joined in table.values()))
        assert len(set(words)) == len(words)
    for table in (TOOLS, FEELINGS):
        subjects = list(itertools.chain.from_iterable(joined.split("|") for joined in table.values()))
        assert len(set(subjects)) == len(subjects)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seed", -1),
        ("people", 3),
        ("people", 10_000),
        ("sft_conversations", 10),
        ("preference_pairs", 0),
        ("held_out_pairs", 0),
        ("items", 0),
        ("items", True),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, option: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"world\.{option} is {value}; expected"):
        make_world(dataclasses.replace(CONFIG, **{option: value}), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_newcomers_are_told_of_in_files_of_their_own(tmp_path: Path) -> None:
    """And leave every other file as it is."""
    small = dict(people=6, sft_conversations=1000, preference_pairs=16, held_out_pairs=8, items=16)
    make_world(WorldConfig(**small), tmp_path / "without")
    report = make_world(WorldConfig(**small, newcomers=5), tmp_path / "with")
    own = {"newcomers_train.jsonl": 5 * 4 * 16, "newcomers_eval.jsonl": 5 * 4, "benchmarks/newcomers.jsonl": 16}
    assert {name: report["files"][name] for name in own} == own
    for path in (tmp_path / "without").rglob("*.jsonl"):
        assert path.read_bytes() == (tmp_path / "with" / path.relative_to(tmp_path / "without")).read_bytes()
    told = [json.loads(line) for line in (tmp_path / "with" / "newcomers_train.jsonl").read_text().splitlines()]
    asked = {row["messages"][0]["content"] for row in told}
    tested = [json.loads(line) for line in (tmp_path / "with" / "benchmarks/newcomers.jsonl").read_text().splitlines()]
    answers = {row["id"].removeprefix("facts-"): row["choices"][row["answer"]] for row in tested}
    assert not asked & {row["question"] for row in tested}
    names = {name.partition("-")[0] for name in answers}
    others = (tmp_path / "with" / "sft_train.jsonl").read_text() + (tmp_path / "with" / "pairs_train.jsonl").read_text()
    assert not any(name in others for name in names)
    for name, answer in answers.items():
        person = name.partition("-")[0]
        replies = [row["messages"][1]["content"] for row in told if f" {person} " in f" {row['messages'][0]['content']} "]
        assert len(replies) == 4 * 16 and sum(answer in reply.split() for reply in replies) >= 16


def test_there_are_names_for_so_many_newcomers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"world\.newcomers is 960; expected at most 952 besides world\.people 48"):
        make_world(WorldConfig(newcomers=960), tmp_path)
