"""Raw rows: every kind of broken or useless row is named with its place, column and remedy; every format is understood."""

from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogdopt_harness.config.schema import DataConfig
from ogdopt_harness.data.rows import Problem, Row, as_messages, rows

USER = {"role": "user", "content": "Name a metal."}
IRON = {"role": "assistant", "content": "Iron."}
WOOD = {"role": "assistant", "content": "Wood."}
GOOD = {"prompt": "Name a metal.", "chosen": "Iron.", "rejected": "Wood."}
DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Name a metal.\n\nAssistant:"


def write(path: Path, *lines: Any) -> str:
    """A JSONL file; bytes are written as they are, everything else as JSON."""
    path.write_bytes(b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines))
    return str(path)


def parse(tmp_path: Path, *lines: Any, kind: str = "preference", **options: Any) -> list[Row | Problem]:
    source = write(tmp_path / "rows.jsonl", *lines)
    return list(rows(DataConfig(train=[source], **options), "train", kind))


def one(tmp_path: Path, line: Any, kind: str = "preference", **options: Any) -> Row | Problem:
    (row,) = parse(tmp_path, line, kind=kind, **options)
    return row


@pytest.mark.parametrize(
    ("line", "reason", "found"),
    [
        (b'{"prompt": "a\xff"}', "broken UTF-8", "byte 0xff at position 13"),
        (b'{"prompt": "a", "cho', "invalid JSON", "Unterminated string"),
        (b'{"n": ' + b"9" * 5000 + b"}", "invalid JSON", "4300"),
        (b'{"prompt": "a", "prompt": "b"}', "duplicate key", "more than once"),
        (b'{"prompt": [{"role": "user", "role": "user"}]}', "duplicate key", "more than once"),
        (b'{"score": NaN}', "not a JSON number", "NaN"),
        (b'{"score": -Infinity}', "not a JSON number", "-Infinity"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply", "brackets"),
        (b'{"prompt": "Hello there", "chosen": "\\ud83d", "rejected": "b"}', "lone surrogate", "U+D83D at character 0"),
        (b'{"prompt": "\\udc00", "chosen": "a", "rejected": "b"}', "lone surrogate", "U+DC00"),
        ([1, 2], "not an object", "list [1, 2]"),
        ("text", "not an object", "str 'text'"),
        ({"prompt": "a", "chosen": "b"}, "missing column", "columns prompt, chosen"),
        ({"question": "a", "accepted": "b"}, "missing column", "columns question, accepted"),
        ({}, "missing column", "columns none"),
        (GOOD | {"chosen": None}, "wrong type", "null"),
        (GOOD | {"prompt": None}, "wrong type", "null"),
        (GOOD | {"rejected": 3}, "wrong type", "int 3"),
        (GOOD | {"rejected": ["Wood."]}, "not a message", "str 'Wood.'"),
        (GOOD | {"prompt": {"role": "user"}}, "wrong type", "dict {'role': 'user'}"),
        (GOOD | {"prompt": " \n"}, "empty prompt", "' \\n'"),
        (GOOD | {"chosen": ""}, "empty completion", "''"),
        (GOOD | {"rejected": " \t\n"}, "empty completion", "' \\t\\n'"),
        (GOOD | {"chosen": []}, "no messages", "an empty list"),
        (GOOD | {"prompt": []}, "no messages", "an empty list"),
        (GOOD | {"chosen": "Wood. "}, "chosen and rejected are identical", "'Wood. '"),
        (GOOD | {"chosen": [WOOD], "rejected": [WOOD]}, "chosen and rejected are identical", "'Wood.'"),
        (
            GOOD | {"prompt": "Name the metal you like.", "chosen": "Name the metal you like. Iron."},
            "prompt repeated",
            "'Name the",
        ),
        ({"prompt": [{**USER, "content": "Name any metal."}], "chosen": "Name any metal. Iron", "rejected": "b"}, None, ""),
        (
            {"prompt": [{**USER, "content": "Name a big metal."}], "chosen": "Name a big metal. Iron", "rejected": "b"},
            "prompt rep",
            "'",
        ),
        (GOOD | {"prompt": [USER, IRON]}, "prompt ends with the assistant", "roles user, assistant"),
        (GOOD | {"prompt": DIALOGUE + " Iron."}, None, ""),  # a string prompt is only read as messages for a chat template
        (GOOD | {"chosen": [{"role": "tool", "content": "x"}]}, "unknown role", "role 'tool'"),
        (GOOD | {"chosen": [{"from": "gpt", "value": "x"}]}, "not a message", "keys from, value"),
        (GOOD | {"chosen": [{"role": "assistant", "content": None}]}, "wrong type", "null"),
        (GOOD | {"chosen": [{"role": "assistant", "content": " "}]}, "empty message", "' '"),
        (GOOD | {"chosen": [IRON, USER, WOOD]}, "several messages", "roles assistant, user, assistant"),
        (GOOD | {"chosen": [IRON, WOOD]}, "roles do not alternate", "roles assistant, assistant"),
        (GOOD | {"prompt": [USER, USER]}, "roles do not alternate", "roles user, user"),
        (GOOD | {"prompt": [{"role": "system", "content": "x"}]}, "roles do not alternate", "roles system"),
        ({"chosen": [USER, IRON], "rejected": [{**USER, "content": "Hm?"}, WOOD]}, "no common prompt", "message 1"),
        ({"chosen": [USER, IRON], "rejected": [USER, IRON, USER, WOOD]}, "no common prompt", "message 2"),
        ({"chosen": [USER, IRON], "rejected": [USER]}, "no answer", "roles user"),
        ({"chosen": [USER, IRON], "rejected": [USER, IRON]}, "chosen and rejected are identical", "'Iron.'"),
        ({"chosen": [IRON], "rejected": [WOOD]}, "no common prompt", "list"),
        ({"chosen": "Iron.", "rejected": "Wood."}, "no common prompt", "'Iron.' and 'Wood.'"),
        ({"chosen": DIALOGUE + " Iron.", "rejected": DIALOGUE}, "empty completion", "''"),
        (
            {"chosen": DIALOGUE + " a\n\nHuman: b\n\nAssistant: c", "rejected": DIALOGUE + " d"},
            "answers differ in several",
            "'",
        ),
        (
            {"prompt": "Name a tree.", "chosen": [USER, IRON], "rejected": [USER, WOOD]},
            "prompt and dialogue differ",
            "'Name a tree.'",
        ),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "label is not a boolean", "str 'yes'"),
        ({"prompt": "a", "completion": "b", "label": 2}, "label is not a boolean", "int 2"),
        ({"prompt": "a", "completion": "b", "label": None}, "label is not a boolean", "null"),
        ({"prompt": "a", "completion": "", "label": True}, "empty completion", "''"),
    ],
)
def test_bad_preference_rows_are_named(tmp_path: Path, line: Any, reason: str | None, found: str) -> None:
    problem = one(tmp_path, line)
    if reason is None:
        assert isinstance(problem, Row)
        return
    assert isinstance(problem, Problem), problem
    assert problem.reason.startswith(reason)
    assert found in problem.found
    assert problem.where == f"{tmp_path / 'rows.jsonl'}:1"
    assert problem.remedy
    assert len(str(problem)) < 600  # a row of megabytes is not printed


@pytest.mark.parametrize(
    ("line", "reason", "found"),
    [
        ({"messages": [USER]}, "no answer", "roles user"),
        ({"messages": [IRON]}, "roles do not alternate", "roles assistant"),
        ({"messages": 3}, "wrong type", "int 3"),
        ({"messages": "a text"}, "no answer", "roles user"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "empty message", "''"),
        ({"prompt": "a", "completion": None}, "wrong type", "null"),
        ({"prompt": "a", "completion": None, "text": "b"}, "wrong type", "null"),
        ({"text": ""}, "empty completion", "''"),
        ({"text": ["a"]}, "wrong type", "list ['a']"),
        ({"prompt": "a"}, "missing column", "columns prompt"),
    ],
)
def test_bad_sft_rows_are_named(tmp_path: Path, line: Any, reason: str, found: str) -> None:
    problem = one(tmp_path, line, kind="sft")
    assert isinstance(problem, Problem)
    assert problem.reason == reason
    assert found in problem.found


@pytest.mark.parametrize(
    ("line", "columns", "prompt", "answers"),
    [
        (GOOD, {}, "Name a metal.", ("Iron.", "Wood.")),
        (
            {"q": "a", "good": "b", "bad": "c", "rejected": "x"},
            {"prompt": "q", "chosen": "good", "rejected": "bad"},
            "a",
            ("b", "c"),
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"chosen": "rejected", "rejected": "chosen"}, "a", ("c", "b")),
        ({"prompt": [USER], "chosen": [IRON], "rejected": [WOOD]}, {}, [USER], ("Iron.", "Wood.")),
        ({"prompt": [USER], "chosen": "Iron.", "rejected": [WOOD]}, {}, [USER], ("Iron.", "Wood.")),
        ({"chosen": [USER, IRON], "rejected": [USER, WOOD]}, {}, [USER], ("Iron.", "Wood.")),
        ({"instruction": "other", "chosen": [USER, IRON], "rejected": [USER, WOOD]}, {}, [USER], ("Iron.", "Wood.")),
        ({"prompt": "Name a metal.", "chosen": [USER, IRON], "rejected": [USER, WOOD]}, {}, [USER], ("Iron.", "Wood.")),
        ({"prompt": [USER], "chosen": [USER, IRON], "rejected": [USER, WOOD]}, {}, [USER], ("Iron.", "Wood.")),
        (
            {"q": "Name a metal.", "chosen": [USER, WOOD, USER, IRON], "rejected": [USER, WOOD, USER, WOOD]},
            {"prompt": "q"},
            [USER, WOOD, USER],
            ("Iron.", "Wood."),
        ),
        ({"chosen": DIALOGUE + " Iron.", "rejected": DIALOGUE + " Wood."}, {}, DIALOGUE, (" Iron.", " Wood.")),
        ({"prompt": "a", "input": "b", "chosen": "c", "rejected": "d"}, {}, "a", ("c", "d")),
        ({"prompt": "a", "input": "b", "chosen": "c", "rejected": "d"}, {"input": "input"}, "a\n\nb", ("c", "d")),
        ({"prompt": "a", "input": "", "chosen": "c", "rejected": "d"}, {"input": "input"}, "a", ("c", "d")),
        ({"x|y": "a", "chosen": "c", "rejected": "d"}, {"prompt": "x|y"}, "a", ("c", "d")),
        ({"y": "a", "chosen": "c", "rejected": "d"}, {"prompt": "x|y"}, "a", ("c", "d")),
        ({"prompt": "Iron", "chosen": "Iron is.", "rejected": "d"}, {}, "Iron", ("Iron is.", "d")),
    ],
)
def test_preference_formats(tmp_path: Path, line: Any, columns: dict[str, str], prompt: Any, answers: tuple[str, str]) -> None:
    row = one(tmp_path, line, columns=columns)
    assert isinstance(row, Row), str(row)
    assert (row.prompt, row.answers, row.label) == (prompt, answers, None)


@pytest.mark.parametrize("label", [True, False, 0, 1])
def test_labelled_completions(tmp_path: Path, label: bool | int) -> None:
    row = one(tmp_path, {"prompt": "a", "completion": [IRON], "label": label})
    assert isinstance(row, Row)
    assert (row.prompt, row.answers, row.label) == ("a", ("Iron.",), bool(label))


@pytest.mark.parametrize(
    ("line", "columns", "prompt", "answer"),
    [
        ({"messages": [USER, IRON]}, {}, [USER], "Iron."),
        (
            {"messages": [{"role": "system", "content": "s"}, USER, IRON]},
            {},
            [{"role": "system", "content": "s"}, USER],
            "Iron.",
        ),
        ({"chosen": [{**USER, "name": "Ann"}, IRON]}, {"messages": "chosen"}, [USER], "Iron."),
        ({"chosen": DIALOGUE + " Iron. "}, {"messages": "chosen"}, as_messages(DIALOGUE), "Iron."),
        ({"prompt": "a", "completion": "b", "text": "c"}, {}, "a", "b"),
        ({"prompt": "a", "completion": "b", "text": "c"}, {"text": "text"}, None, "c"),
        ({"prompt": [USER], "completion": [IRON]}, {}, [USER], "Iron."),
        ({"prompt": "Name a metal.", "completion": [USER, IRON]}, {}, [USER], "Iron."),
        ({"text": "c"}, {}, None, "c"),
    ],
)
def test_sft_formats(tmp_path: Path, line: Any, columns: dict[str, str], prompt: Any, answer: str) -> None:
    row = one(tmp_path, line, kind="sft", columns=columns)
    assert isinstance(row, Row), str(row)
    assert (row.prompt, row.answers) == (prompt, (answer,))


def test_a_file_may_mix_conversations_and_texts(tmp_path: Path) -> None:
    found = parse(tmp_path, {"messages": [USER, IRON]}, {"text": "Iron is a metal."}, kind="sft")
    assert [row.format for row in found if isinstance(row, Row)] == ["messages", "text"]


@pytest.mark.parametrize(
    ("columns", "remedy"),
    [({}, "columns: {chosen: <name in the file>, rejected: <name in the file>}"), ({"prompt": "question"}, "rejected: <name")],
)
def test_a_missing_column_shows_the_option_to_write(tmp_path: Path, columns: dict[str, str], remedy: str) -> None:
    problem = one(tmp_path, {"question": "a", "accepted": "b", "refused": "c"}, columns=columns)
    assert isinstance(problem, Problem)
    assert "question, accepted, refused" in problem.found
    assert remedy in problem.remedy


def test_a_mapped_column_must_be_there(tmp_path: Path) -> None:
    problem = one(tmp_path, {"chosen": [USER, IRON], "rejected": [USER, WOOD]}, columns={"prompt": "question"})
    assert isinstance(problem, Problem)
    assert (problem.reason, problem.column) == ("missing column", "question")


@pytest.mark.parametrize("columns", [{"winner": "chosen"}, {"chosen": "a", "label": "b"}, {"text": "t"}])
def test_columns_that_no_format_has_are_refused(tmp_path: Path, columns: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"preference\.data\.columns maps .*expected our names"):
        parse(tmp_path, GOOD, columns=columns)


def test_as_messages_reads_dialogues_and_nothing_else() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}, USER]
    assert as_messages(DIALOGUE) == turns
    assert as_messages(DIALOGUE.removeprefix("\n\nHuman: ")) == turns  # the first tag may be missing
    assert as_messages("Human resources: why?") == [{"role": "user", "content": "Human resources: why?"}]
    quoted = "Continue the dialogue:\n\nHuman: Hi\n\nAssistant:"
    assert as_messages(quoted) == [{"role": "user", "content": quoted}]


def test_lines_are_cut_at_newlines_alone(tmp_path: Path) -> None:
    """str.splitlines would cut this record three times; json.dumps(ensure_ascii=False) writes these characters raw."""
    prompt = "one\u2028two\x85three\u2029four"
    line = json.dumps(GOOD | {"prompt": prompt}, ensure_ascii=False).encode()
    row = one(tmp_path, b"\xef\xbb\xbf" + line + b"\r")
    assert isinstance(row, Row)
    assert row.prompt == prompt


@given(st.lists(st.tuples(*[st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)] * 2), max_size=5))
def test_any_text_survives_the_round_trip(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps({"prompt": p, "completion": c}, ensure_ascii=False) + "\n" for p, c in pairs)
    found = list(rows(DataConfig(train=[str(path)]), "train", "sft"))
    for i, ((prompt, completion), row) in enumerate(zip(pairs, found, strict=True), start=1):
        if isinstance(row, Row):
            assert (row.prompt, row.answers, row.where) == (prompt, (completion,), f"{path}:{i}")
        else:
            assert row.reason in ("prompt repeated in the completion", "prompt and dialogue differ")


@given(st.binary(max_size=60))
def test_any_bytes_are_a_row_or_a_named_problem(tmp_path_factory: pytest.TempPathFactory, line: bytes) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes(line)
    for row in rows(DataConfig(train=[str(path)]), "train", "preference"):
        assert isinstance(row, (Row, Problem))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["user", "assistant", DIALOGUE]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3),
    max_leaves=8,
)


@given(st.fixed_dictionaries({"chosen": JSON, "rejected": JSON}, optional={"prompt": JSON, "completion": JSON, "label": JSON}))
def test_any_object_is_a_row_or_a_named_problem(tmp_path_factory: pytest.TempPathFactory, line: dict[str, Any]) -> None:
    for kind, columns in (
        ("preference", {}),
        ("sft", {"prompt": "prompt", "completion": "chosen"}),
        ("sft", {"messages": "chosen"}),
    ):
        found = one(tmp_path_factory.mktemp("rows"), line, kind=kind, columns=columns)
        assert isinstance(found, (Row, Problem))
        str(found)


# --- sources -------------------------------------------------------------------------------------------------------------


def test_blank_lines_are_skipped_but_counted_as_lines(tmp_path: Path) -> None:
    assert [row.where.rsplit(":", 1)[1] for row in parse(tmp_path, GOOD, b"", b"  ", GOOD)] == ["1", "4"]


def test_folders_and_several_sources_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", GOOD)
    write(tmp_path / "a.jsonl", GOOD, GOOD)
    (tmp_path / "notes.txt").write_text("not read")
    config = DataConfig(train=[str(tmp_path), str(tmp_path / "b.jsonl")], max_train_rows=4)
    places = [Path(row.where).name for row in rows(config, "train", "preference")]
    assert places == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:1"]
    with pytest.raises(ValueError, match="holds no file"):
        (tmp_path / "empty").mkdir()
        list(rows(DataConfig(train=[str(tmp_path / "empty")]), "train", "sft"))


def test_the_first_rows_read_count_also_the_bad_ones(tmp_path: Path) -> None:
    found = parse(tmp_path, b"{", GOOD, GOOD, max_train_rows=2)
    assert [type(row) for row in found] == [Problem, Row]


def test_relative_paths_start_at_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "rows.jsonl", GOOD)
    monkeypatch.chdir(tmp_path)
    assert [row.where for row in rows(DataConfig(eval=["rows.jsonl"]), "eval", "preference")] == ["rows.jsonl:1"]


def test_a_missing_file_is_named_with_its_option(tmp_path: Path) -> None:
    for source in ("nowhere/pairs.jsonl", "pairs.jsonl.gz", str(tmp_path / "nothing"), "../nothing", "./a/b/c"):
        with pytest.raises(ValueError, match=r"preference\.data\.train: no file or folder .*(nothing|pairs|c)") as error:
            list(rows(DataConfig(train=[source]), "train", "preference"))
        assert source in str(error.value)
    with pytest.raises(ValueError, match=r"sft\.data\.eval is empty"):
        list(rows(DataConfig(), "eval", "sft"))


def test_a_broken_archive_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(json.dumps(GOOD | {"n": i}).encode() for i in range(5000)))[:-2000])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz cannot be read after line \d{2,}") as error:
        list(rows(DataConfig(train=[str(path)]), "train", "preference"))
    assert error.value.__cause__ is not None
    path.write_bytes(json.dumps(GOOD).encode())
    with pytest.raises(ValueError, match=r"cannot be read after line 0.*[Nn]ot a gzipped file"):
        list(rows(DataConfig(train=[str(path)]), "train", "preference"))


def test_json_lists_and_parquet_are_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows.json").write_text(json.dumps([GOOD, GOOD | {"chosen": None}]))
    datasets.Dataset.from_list([GOOD]).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "broken.json").write_text("[{")
    found = list(rows(DataConfig(train=[str(tmp_path / "rows.json"), str(tmp_path / "rows.parquet")]), "train", "preference"))
    assert [type(row) for row in found] == [Row, Problem, Row]
    assert [Path(row.where).name for row in found] == ["rows.json[0]", "rows.json[1]", "rows.parquet[0]"]
    with pytest.raises(ValueError, match=r"broken\.json: invalid JSON: .*; expected a list of objects") as error:
        list(rows(DataConfig(train=[str(tmp_path / "broken.json")]), "train", "preference"))
    assert error.value.__cause__ is not None


def test_a_hub_id_is_loaded_with_its_split_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, configuration: str | None, split: str) -> list[dict[str, str]]:
        calls.append((name, configuration, split))
        return [GOOD]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    config = DataConfig(eval=["owner/pairs", "owner/pairs:main"], eval_split="test[:1%]")
    assert [row.where for row in rows(config, "eval", "preference")] == ["owner/pairs[0]", "owner/pairs:main[0]"]
    assert calls == [("owner/pairs", None, "test[:1%]"), ("owner/pairs", "main", "test[:1%]")]


def test_a_hub_id_that_cannot_be_loaded_says_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'owner/pairs' on the Hub (offline)\nlong tail")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError) as error:
        list(rows(DataConfig(train=["owner/pairs"]), "train", "sft"))
    message = str(error.value)
    for part in (
        "sft.data.train",
        "'owner/pairs'",
        "ConnectionError: Couldn't reach",
        "'train'",
        "sft.data.train_split",
        "network",
    ):
        assert part in message
    assert "long tail" not in message
    assert isinstance(error.value.__cause__, ConnectionError)
