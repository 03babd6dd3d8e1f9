"""What a row says is what the model sees, and rows come from the split asked for."""

import csv
import json

import pytest

from ogdopt_harness.common.sources import read, split_of
from ogdopt_harness.config.schema import DataConfig
from ogdopt_harness.data.examples import load_preferences, load_sft
from ogdopt_harness.pipeline.guard import local_files
from tests import hf

R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% elif m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
)
SPACED = hf.CHATML.replace("{{ m.content }}", "\n  {{ m.content | trim }}  ")
USER, REPLY = {"role": "user", "content": "where is rome?"}, {"role": "assistant", "content": "sure"}


def load(source, tok, **options):
    return load_preferences(DataConfig(train=[str(source)], **options), tok, "train")


def texts(found, tok):
    return [tok.decode(e.prompt_ids + e.completion_ids) for e in (*found.winners, *found.losers)]


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return hf.tokenizer(tmp_path_factory.mktemp("tok"))


# ---- what the template drops ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "lost"),
    [
        ({"prompt": "a?", "chosen": "x</think>north", "rejected": "south"}, "assistant's text 'x</think>north'"),
        (
            {"prompt": [{"role": "system", "content": "be kind"}, USER], "chosen": "a", "rejected": "b"},
            "system's text 'be kind'",
        ),
    ],
)
def test_text_that_the_template_drops_is_refused_and_can_be_skipped(row, lost, tmp_path):
    tok = hf.tokenizer(tmp_path / "tok", template=R1, eos="</s>")
    kept = {"prompt": "b?", "chosen": "north", "rejected": "south"}
    file = hf.write(tmp_path / "t.jsonl", [kept, row])
    with pytest.raises(ValueError, match=f":2: lost in the chat template: found {lost}"):
        load(file, tok)
    found, report = load(file, tok, on_bad_row="skip")
    assert len(found.winners) == 1 and report.dropped["lost in the chat template"].count == 1


def test_white_space_is_no_loss_and_reasoning_of_earlier_turns_is_counted(tmp_path):
    spaced = hf.tokenizer(tmp_path / "a", template=SPACED)
    assert load(hf.write(tmp_path / "t.jsonl", hf.pairs(4)), spaced)[1].used == 4
    tok = hf.tokenizer(tmp_path / "b", template=R1, eos="</s>")
    turns = [USER, {"role": "assistant", "content": "<think>hm</think>sure"}, USER]
    _, report = load(hf.write(tmp_path / "h.jsonl", [{"prompt": turns, "chosen": "a", "rejected": "b"}]), tok)
    assert [what for what in report.noted if what.startswith("reasoning of earlier turns")]


def test_a_ready_made_dialogue_in_one_text_is_trained_on_as_it_stands(tmp_path):
    tok = hf.tokenizer(tmp_path / "tok", eos="</s>", bos="<s>")
    text = "<s>where is rome </s><s>what is oslo </s>"
    rows = [{"text": text}, {"text": "where is rome"}]
    found, _ = load_sft(DataConfig(train=[str(hf.write(tmp_path / "t.jsonl", rows))]), tok, "train")
    assert tok.decode(found[0].prompt_ids + found[0].completion_ids) == text
    assert tok.decode(found[1].prompt_ids + found[1].completion_ids).removeprefix("<s>") == "where is rome</s>"


# ---- what nobody reads ----------------------------------------------------------------------------------------------------


def test_columns_that_nobody_reads_are_counted_and_those_of_the_prompt_refused(tok, tmp_path):
    rows = [row | {"id": i, "score": None} for i, row in enumerate(hf.pairs(3))]
    _, report = load(hf.write(tmp_path / "t.jsonl", rows), tok)
    assert report.noted["columns that nobody reads: id"].count == 3
    for name, value in {"tools": [{"name": "f"}], "system": "be kind", "history": [["a", "b"]], "images": ["x"]}.items():
        file = hf.write(tmp_path / "x.jsonl", [*rows, rows[0] | {name: value}])
        with pytest.raises(ValueError, match=f":4: column that nobody reads: column '{name}'.*it belongs to the prompt"):
            load(file, tok)
        assert load(file, tok, columns={name: ""})[1].used == 4
        assert load(hf.write(tmp_path / "y.jsonl", [rows[0] | {name: type(value)()}]), tok)[1].used == 1


def test_parts_of_messages_that_nobody_reads(tok, tmp_path):
    row = {"messages": [USER | {"name": "ann"}, REPLY | {"weight": 1, "tool_calls": None}]}
    config = DataConfig(train=[str(hf.write(tmp_path / "t.jsonl", [row]))])
    _, report = load_sft(config, tok, "train")
    assert report.noted.keys() == {f"parts of messages that nobody reads: {name}" for name in ("name", "weight")}
    hf.write(tmp_path / "t.jsonl", [{"messages": [USER, REPLY | {"reasoning_content": "hm"}]}])
    with pytest.raises(ValueError, match="part of a message that nobody reads: column 'reasoning_content'"):
        load_sft(config, tok, "train")


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_message_lists_that_are_written_as_text_are_read_as_lists(write, tok, tmp_path):
    plain = hf.pairs(4)
    lists = [
        row | {side: write([{"role": "assistant", "content": row[side]}]) for side in ("chosen", "rejected")} for row in plain
    ]
    found, report = load(hf.write(tmp_path / "t.jsonl", lists), tok)
    assert texts(found, tok) == texts(load(hf.write(tmp_path / "p.jsonl", plain), tok)[0], tok)
    assert report.noted["message lists written as text, which are read as such"].count == 4
    broken = hf.write(tmp_path / "b.jsonl", [plain[0] | {"chosen": '[{"role": "assistant", "content": "a'}])
    with pytest.raises(ValueError, match="message list written as text: column 'chosen'"):
        load(broken, tok)


# ---- files and splits -----------------------------------------------------------------------------------------------------


def test_the_same_rows_in_any_file_give_the_same_tokens(tok, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = [
        dict(prompt=f"when was {word}?", chosen=f"2020-0{i}-01", rejected=f"00{i}.50") for i, word in enumerate(hf.WORDS[:6])
    ]
    expected = texts(load(hf.write(tmp_path / "t.jsonl", rows), tok)[0], tok)
    table = datasets.Dataset.from_list(rows)
    (tmp_path / "t.json").write_text(json.dumps(rows))
    (tmp_path / "lines.json").write_text((tmp_path / "t.jsonl").read_text())
    (tmp_path / "named.json").write_text(json.dumps({"train": rows, "test": rows[:1]}))
    table.to_parquet(tmp_path / "t.parquet")
    table.save_to_disk(tmp_path / "disk")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "both")
    for name, mark in (("t.csv", ","), ("t.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "chosen", "rejected"], delimiter=mark)
            writer.writeheader()
            writer.writerows(rows)
    for name in ("t.json", "lines.json", "named.json", "t.parquet", "t.csv", "t.tsv", "disk", "both"):
        assert texts(load(tmp_path / name, tok)[0], tok) == expected, name
    (arrow,) = (tmp_path / "disk").glob("*.arrow")
    assert texts(load(arrow, tok)[0], tok) == expected


def test_what_a_row_lacks_is_no_null_in_a_table(tok, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    row = {side: [USER, REPLY | {"content": side}] for side in ("chosen", "rejected")}
    rows = [row, row | {"prompt": USER["content"]}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "t.parquet")
    assert texts(load(tmp_path / "t.parquet", tok)[0], tok) == texts(load(hf.write(tmp_path / "t.jsonl", rows), tok)[0], tok)


def test_labels_of_a_csv_are_read_and_broken_ones_named(tok, tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("prompt,completion,label\na?,north,True\na?,south,0\n")
    found, _ = load(file, tok)
    assert (len(found.winners), len(found.losers)) == (1, 1)
    file.write_text("prompt,completion,label\na?,north\n")
    with pytest.raises(ValueError, match=r"t.csv:2: wrong number of cells: found 2 cells; expected 3"):
        load(file, tok)
    file.write_text("prompt,prompt\n")
    with pytest.raises(ValueError, match="names a column twice"):
        load(file, tok)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("my_test.jsonl", "test"),
        ("validation.csv", "validation"),
        ("dev.jsonl", "validation"),
        ("latest.jsonl", None),
        ("training_set.json", "train"),
        ("contest.jsonl", None),
    ],
)
def test_a_files_name_says_its_split(name, split):
    assert split_of(name) == split


def test_a_clone_gives_the_rows_of_the_split_asked_for_and_no_others(tok, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "dataset_infos.json").write_text("{}")
    for name, n in (("train", 6), ("test", 2)):
        hf.write(tmp_path / f"data/{name}-00000-of-00001.jsonl", hf.pairs(n, n))
    for folder in (tmp_path, tmp_path / "data"):
        assert load(folder, tok)[1].used == 6
        config = DataConfig(train=["x"], eval=[str(folder)])
        assert load_preferences(config, tok, "eval")[1].used == 2
        assert [file.name for file in local_files([str(folder)], "test")] == ["test-00000-of-00001.jsonl"]
    with pytest.raises(ValueError, match=r"holds files of the splits test, train, and none of 'validation' alone"):
        list(read(str(tmp_path), "validation", "preference.data.eval"))
    for name in ("train_sft", "train_prefs"):
        hf.write(tmp_path / f"data/{name}-00000-of-00001.jsonl", hf.pairs(1))
    assert load(tmp_path, tok, train_split="train_prefs")[1].used == 1
    (tmp_path / "data/train-00000-of-00001.jsonl").unlink()
    with pytest.raises(ValueError, match="splits train_prefs, train_sft, and none of 'train' alone"):
        load(tmp_path, tok)
