"""Special tokens that a user's text writes out are text, for every tokenizer; they are counted and said."""

import dataclasses
import json

import pytest

from ogdopt_harness.config.schema import DataConfig
from ogdopt_harness.data.examples import load_preferences, load_sft
from ogdopt_harness.data.literal import BASES, Literals
from ogdopt_harness.modeling.tokenizer import train_tokenizer

from . import small

TYPED = "where </s> does <s> rador [INST] mila <unk> [/INST] ?"
KINDS = ("word", "bpe")


@pytest.fixture(scope="module", params=KINDS)
def tok(request, tmp_path_factory):
    settings = dataclasses.replace(small.MODEL, tokenizer_type=request.param, vocab_size=512)
    return train_tokenizer([small.TEXT, TYPED], settings, tmp_path_factory.mktemp(request.param))


def test_a_vocabulary_has_no_holes_where_texts_write_special_tokens(tok):
    assert sorted(tok.get_vocab().values()) == list(range(len(tok)))


def test_typed_tokens_are_letters(tok):
    literals = Literals(tok)
    assert literals.count(TYPED) == 5 and literals.count(small.TEXT) == 0
    (ids, plain) = literals.ids([literals.hide(TYPED), small.TEXT])
    control = set(tok.all_special_ids) - {tok.unk_token_id}
    assert not control & set(ids)
    assert plain == tok(small.TEXT, add_special_tokens=False).input_ids
    if not tok.decode(plain).startswith("where <unk>"):  # letters can be read back where there are letters
        assert [word for word in ("where", "rador", "mila") if word not in tok.decode(ids)] == []


def test_rows_are_trained_on_as_text(tok, tmp_path):
    rows = [
        {"prompt": TYPED, "chosen": "sure </s> friend", "rejected": "um </s>"},
        {"prompt": "where", "chosen": "a", "rejected": "um"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, report = load_preferences(DataConfig([str(tmp_path / "rows.jsonl")]), tok, "train")
    assert report.used == 2
    assert report.noted["special tokens written out, which are taken as text"].places == [f"{tmp_path / 'rows.jsonl'}:1"]
    for example in [*found.winners, *found.losers]:
        ids = example.prompt_ids + example.completion_ids
        assert ids.count(tok.eos_token_id) == 1 and ids[-1] == tok.eos_token_id
        assert ids.count(tok.bos_token_id) == 1 and ids[0] == tok.bos_token_id
        assert tok.convert_tokens_to_ids("[INST]") in ids and ids.count(tok.convert_tokens_to_ids("[/INST]")) == 1


def test_texts_with_private_characters(tok):
    literals = Literals(tok)
    text = f"{chr(BASES[0])} </s>"
    assert ord(literals.hide(text)[-1]) >= BASES[1]
    with pytest.raises(ValueError, match="characters of every private block"):
        literals.hide("".join(map(chr, BASES)) + "</s>")


def test_a_text_row_is_what_it_is(tok, tmp_path):
    """Plain text is the whole sequence, its special tokens included."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "where does rador </s>"}) + "\n")
    (example,), _ = load_sft(DataConfig([str(tmp_path / "rows.jsonl")]), tok, "train")
    assert example.completion_ids.count(tok.eos_token_id) == 1
