"""The journal: what was finished is there after any interruption, and nothing else is."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogdopt_harness.common.journal import Journal

TEXTS = st.text(max_size=8)


@given(st.lists(st.dictionaries(TEXTS, TEXTS | st.integers() | st.none(), max_size=3), max_size=6), st.data())
def test_a_journal_cut_anywhere_holds_the_lines_before_the_cut(tmp_path_factory, values, data):
    file = tmp_path_factory.mktemp("journal") / "deep" / "answers.jsonl"
    journal = Journal(file)
    rows = [{"id": str(i), "value": value} for i, value in enumerate(values)]
    for row in rows:
        journal.add([row])
    whole = file.read_bytes() if rows else b""
    cut = data.draw(st.integers(0, len(whole)))
    if rows:
        file.write_bytes(whole[:cut])
    kept = rows[: whole[:cut].count(b"\n")]
    again = Journal(file)
    assert list(again.values()) == kept
    again.add(rows[len(kept) :])  # goes on from there, on a line of its own
    assert dict(Journal(file)) == {row["id"]: row for row in rows}


def test_processes_write_files_of_their_own_and_read_all(tmp_path):
    file = tmp_path / "answers.jsonl"
    for rank in (0, 2):
        Journal(file, rank=rank).add([{"id": f"of {rank}"}])
    assert set(Journal(file, rank=1)) == {"of 0", "of 2"} and len(list(tmp_path.iterdir())) == 2
    (tmp_path / "answers.jsonl.rank-2").open("a").write('{"id": "half')
    assert set(Journal(file)) == {"of 0", "of 2"}  # that line is its own process's to mend
    assert (tmp_path / "answers.jsonl.rank-2").read_text().endswith("half")
    Journal(file).remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", ["{", "[1]", '{"key": 1}', "3"])
def test_a_line_that_is_none_is_named(tmp_path, line):
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"id": "a"}) + f"\n{line}\n" + json.dumps({"id": "b"}) + "\n")
    with pytest.raises(ValueError, match=r"answers.jsonl:2: found .*expected a JSON object with 'id': remove that line"):
        Journal(file)
