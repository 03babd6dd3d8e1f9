"""Pairs from a model's own samples: the four scenarios, rules and outside scores, the same samples after any interruption."""

import json

import pytest

from ogdopt_harness.commands import pairs
from ogdopt_harness.commands.pairs import make_pairs
from ogdopt_harness.config.commands import PairsConfig
from ogdopt_harness.config.schema import DataConfig
from ogdopt_harness.data.examples import load_preferences
from tests.test_lm_evals import NEW, export, tiny_model, word_tokenizer

ROWS = [
    {"prompt": f"where does mila live ? {word}", "chosen": f"in {word}", "rejected": "um whatever", "answer": "oslo"}
    for word in ("oslo", "rome", "lima", "cairo")
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    found = []
    for seed in (3, 4):
        tokenizer = word_tokenizer(NEW)
        made = tiny_model(tokenizer, seed=seed)
        found.append(str(export(made, tokenizer, tmp_path_factory.mktemp("model") / f"run-{seed}" / "model" / "epoch-1")))
    return found


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "rows.jsonl", ROWS)


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def config(tmp_path, chosen, rejected, **options):
    style = tmp_path / "style.json"
    style.write_text(json.dumps({"chosen_pattern": "[a-m]", "rejected_pattern": "[n-z]"}))
    settings = dict(score=f"style:{style}", num_return_sequences=6, max_new_tokens=3, device="cpu")
    return PairsConfig(str(tmp_path / "out"), chosen, rejected, **(settings | options))


def read(file):
    return [json.loads(line) for line in open(file, encoding="utf-8")]


def made(rows, setting):
    return read(make_pairs(rows, setting))


@pytest.mark.parametrize("scenario", ["1", "2", "3", "two models"])
def test_scenarios(scenario, models, rows, tmp_path):
    one, other = models
    chosen, rejected = {"1": (one, one), "2": ("row", one), "3": (one, "row"), "two models": (one, other)}[scenario]
    setting = config(tmp_path, chosen, rejected)
    found = made(rows, setting)
    score = pairs.scorer(setting.score, [])
    files = {m: pairs.samples_file(setting, m) for m in {chosen, rejected} - {"row"}}
    samples = {m: {row["prompt"]: row["answers"] for row in read(file)} for m, file in files.items()}
    assert found
    for pair in found:
        row = next(r for r in ROWS if r["prompt"] == pair["prompt"])
        for side, source, best in (("chosen", chosen, max), ("rejected", rejected, min)):
            assert pair[f"source_{side}"] == source
            if source == "row":
                assert pair[side] == row[side] and f"score_{side}" not in pair
            else:
                drawn = [text for text in samples[source][pair["prompt"]] if text]
                assert len(samples[source][pair["prompt"]]) == 6 and pair[side] in drawn
                assert pair[f"score_{side}"] == score(None, pair[side]) == best(score(None, text) for text in drawn)
    if scenario == "1":
        assert all(pair["score_chosen"] > pair["score_rejected"] for pair in found)


def test_what_is_written_can_be_trained_on(models, rows, tmp_path):
    file = make_pairs(rows, config(tmp_path, "row", models[0]))
    found, report = load_preferences(DataConfig(train=[str(file)]), word_tokenizer(NEW), "train")
    assert found.paired and report.used == len(read(file))


def test_samples_do_not_depend_on_interruptions_or_neighbours(models, rows, tmp_path, monkeypatch):
    whole = made(rows, config(tmp_path, models[0], models[0]))
    other = tmp_path / "again"
    other.mkdir()
    setting = config(other, models[0], models[0])
    add, calls = pairs.Journal.add, []

    def dies(self, found):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(found)
        add(self, found)

    with monkeypatch.context() as patch:
        patch.setattr(pairs.Journal, "add", dies)
        with pytest.raises(KeyboardInterrupt):
            make_pairs(rows, setting)
    assert len(read(pairs.samples_file(setting, models[0]))) == 2
    assert made(rows, setting) == whole
    with pytest.raises(ValueError, match=r"made with other settings: temperature was 1\.0 and is 0\.5"):
        make_pairs(rows, config(other, models[0], models[0], temperature=0.5))


def test_answers_and_scores_from_elsewhere(models, rows, tmp_path):
    found = made(rows, config(tmp_path, models[0], models[0]))
    setting = config(tmp_path, models[0], models[0], score="answer")
    score = pairs.scorer("answer", [])
    ask = pairs.read_asks(rows, setting)[0]
    assert [score(ask, text) for text in ("in Oslo .", "in osloer", "rome")] == [1.0, 0.0, 0.0]
    lines = [
        {"prompt": row["prompt"], "answer": text, "score": k}
        for row in read(pairs.samples_file(setting, models[0]))
        for k, text in enumerate(dict.fromkeys(row["answers"]))
    ]
    file = write(tmp_path / "scores.jsonl", lines)
    judged = made(rows, config(tmp_path, models[0], models[0], score=f"scores:{file}"))
    assert judged != found and all(pair["score_rejected"] < pair["score_chosen"] for pair in judged)
    write(tmp_path / "scores.jsonl", lines[1:])
    with pytest.raises(ValueError, match=r"scores\.jsonl has no line for the answer"):
        make_pairs(rows, config(tmp_path, models[0], models[0], score=f"scores:{file}"))
    write(tmp_path / "scores.jsonl", [lines[0] | {"score": "high"}])
    with pytest.raises(ValueError, match=r"scores\.jsonl:1: .* expected a text and a number"):
        make_pairs(rows, config(tmp_path, models[0], models[0], score=f"scores:{file}"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(chosen="row", rejected="row"), "both 'row'"),
        (dict(num_return_sequences=1), "no best and no worst"),
        (dict(num_return_sequences=0), "num_return_sequences is 0"),
        (dict(temperature=0.0), "temperature is 0.0"),
        (dict(chosen="a/m/epoch-1", rejected="b/m/epoch-1"), "end in the same folders"),
        (dict(score="taste"), "score is 'taste'; expected style:FILE, answer, or scores:FILE"),
        (dict(score="scores:none.jsonl"), "no file none.jsonl"),
    ],
)
def test_mistakes_in_options(options, message, models, rows, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_pairs(rows, config(tmp_path, **({"chosen": models[0], "rejected": models[0]} | options)))


@pytest.mark.parametrize(
    ("row", "source", "message"),
    [
        ({"prompt": 3}, "model", r"rows\.jsonl:2: no prompt: column 'prompt'"),
        ({"prompt": "where ?"}, "row", r"rows\.jsonl:2"),
        ([1], "model", r"rows\.jsonl:2: not an object"),
    ],
)
def test_mistakes_in_rows(row, source, message, models, tmp_path):
    file = write(tmp_path / "rows.jsonl", [ROWS[0], row])
    with pytest.raises(ValueError, match=message):
        make_pairs(file, config(tmp_path, models[0] if source == "model" else "row", models[0]))


def test_prompts_without_a_difference_are_left_out_and_counted(models, rows, tmp_path, capsys):
    style = tmp_path / "none.json"
    style.write_text(json.dumps({"chosen_pattern": "QQ", "rejected_pattern": "QQ"}))
    with pytest.raises(ValueError, match=r"none of 4 prompts gave a pair \(4 of equal scores\)"):
        make_pairs(rows, config(tmp_path, models[0], models[0], score=f"style:{style}"))
    make_pairs(rows, config(tmp_path, "row", models[0], score=f"style:{style}"))
    assert "4 pairs of 4 prompts; left out: none" in capsys.readouterr().out
