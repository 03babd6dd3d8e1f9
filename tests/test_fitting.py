"""A tokenizer that is not the model's, and rows beyond its positions, are refused by a run and by its dry run."""

import shutil

import pytest

from ogdopt_harness.modeling.tokenizer import load_tokenizer
from tests import hf


@pytest.fixture(params=[[], ["--dry_run"]], ids=["run", "dry run"])
def ends(request, tmp_path, monkeypatch, capsys):
    """What the command ends with, and what it says."""

    def start(file, *words):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)  # each time a new study
        status = hf.start(monkeypatch, "--config", file, *words, *request.param)
        said = capsys.readouterr()
        return status, said.out + said.err

    return start


def test_a_tokenizer_larger_than_the_embedding_or_of_other_words(tmp_path, ends):
    train = hf.write(tmp_path / "t.jsonl", hf.pairs(8))
    size = len(hf.tokenizer(tmp_path / "own"))
    hf.model(tmp_path / "m", vocab=size)
    larger = load_tokenizer(tmp_path / "own")
    larger.add_special_tokens({"pad_token": "[PAD]"})
    larger.save_pretrained(tmp_path / "larger")
    hf.tokenizer(tmp_path / "other", vocab=size - 5, bos="<s>")
    file = hf.recipe(tmp_path, tmp_path / "m", train, max_steps=1)
    status, said = ends(file, "--model.tokenizer_name_or_path", tmp_path / "larger")
    assert status == 2 and f"has {size + 1} tokens, and the model" in said and f"has embeddings for {size}" in said
    status, said = ends(file, "--model.tokenizer_name_or_path", tmp_path / "other")
    assert status == 2 and "are others than the model" in said
    assert not list(tmp_path.glob("out/seed-0/ogd/metrics.jsonl"))
    assert ends(file)[0] == 0


def test_rows_beyond_a_table_of_positions(tmp_path, ends):
    rows = hf.pairs(8)
    rows[5]["chosen"] += " " + " ".join(hf.WORDS * 2)
    train = hf.write(tmp_path / "t.jsonl", rows)
    hf.model(tmp_path / "gpt2", "gpt2", n_positions=64)
    status, said = ends(hf.recipe(tmp_path, tmp_path / "gpt2", train, max_steps=1))
    assert status == 2 and "and the model has a table of 64 positions; set preference.data.max_length to 64" in said
    hf.model(tmp_path / "opt", "opt", max_position_embeddings=64)
    status, said = ends(hf.recipe(tmp_path, tmp_path / "opt", train, max_steps=1))
    assert status == 2 and "a table of 64 positions" in said
    hf.model(tmp_path / "m", max_position_embeddings=64)
    with pytest.warns(UserWarning, match="and the model was made for 64 positions"):
        assert ends(hf.recipe(tmp_path, tmp_path / "m", train, max_steps=1))[0] == 0
