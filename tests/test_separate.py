"""`ogdopt separation`: what it measures of models before and after, and what it refuses."""

import json

import pytest
import torch

from ogdopt.dynamics import means, priority, separation
from ogdopt_harness.cli import command
from ogdopt_harness.commands.separation import asked, decision, measure
from ogdopt_harness.config.commands import SeparationConfig
from ogdopt_harness.config.schema import ModelConfig
from ogdopt_harness.data.behaviours import made_up
from ogdopt_harness.modeling.build import build_model
from ogdopt_harness.modeling.embeddings import embed
from ogdopt_harness.modeling.tokenizer import train_tokenizer
from tests import small

BEHAVIOURS = made_up((0.3, 0.9), 24)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    config = ModelConfig(None, small.ARCHITECTURE | {"max_position_embeddings": 256}, None, vocab_size=400)
    texts = [q for b in BEHAVIOURS.values() for q in (*b.positive, *b.negative)]
    tokenizer = train_tokenizer([*texts, " Yes No"], config, folder / "tokenizer")
    tokenizer.chat_template = None
    paths = []
    for seed in (0, 1):
        build_model(config, tokenizer, seed).save_pretrained(folder / f"m{seed}")
        tokenizer.save_pretrained(folder / f"m{seed}")
        paths.append(str(folder / f"m{seed}"))
    return paths, tokenizer, config


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "statements.jsonl"
    file.write_text(
        "".join(
            json.dumps({"question": q, "answer_matching_behavior": answer, "behavior": b.name}) + "\n"
            for b in BEHAVIOURS.values()
            for side, answer in ((b.positive, " Yes"), (b.negative, " No"))
            for q in side
        )
    )
    return str(file)


def test_measures_of_two_models(models, rows, tmp_path, capsys):
    paths, tokenizer, config = models
    words = [*paths, "--data_dir", rows, "--output_dir", str(tmp_path / "out"), "--limit", "10", "--device", "cpu"]
    command(["separation", *words])
    assert "distinguishability" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "separation.json").read_text())["measures"]
    assert len(found) == 2 and {p.name for p in (tmp_path / "out").glob("*.svg")} == {"music.svg", "sport.svg"}
    model = build_model(config, tokenizer, 1)
    pairs = {}
    for b in BEHAVIOURS.values():
        pairs[b.name] = [embed(model, [asked(tokenizer, q) for q in side[:10]]) for side in (b.positive, b.negative)]
    rows_ = model.get_output_embeddings().weight.detach()
    yes, no = (tokenizer(answer, add_special_tokens=False).input_ids for answer in (" Yes", " No"))
    first, second = next((x, y) for x, y in zip(yes, no) if x != y)
    torch.testing.assert_close(decision(model, tokenizer, "x"), rows_[first] - rows_[second])
    levels = priority(torch.stack([means(*pair) for pair in pairs.values()])).tolist()
    last = list(found.values())[1]
    for (name, pair), level in zip(pairs.items(), levels):
        expected = separation(*pair, rows_[first] - rows_[second]) | {"dynamics/priority": level}
        assert last[name] == pytest.approx(expected, rel=1e-4)


def test_questions_are_asked_as_in_the_paper_or_in_the_models_template(models):
    _, tokenizer, _ = models
    assert tokenizer.decode(asked(tokenizer, "calm ?")) == "calm ?\n"
    tokenizer.chat_template = "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    try:
        assert tokenizer.decode(asked(tokenizer, "calm ?")) == "[INST] calm ? [/INST]"
    finally:
        tokenizer.chat_template = None


def test_mistakes_are_named(models, rows, tmp_path):
    paths, _, _ = models
    with pytest.raises(ValueError, match=r"behaviours names \['art'\]; .* has music, sport"):
        measure(paths[:1], SeparationConfig(rows, behaviours=["art"]))
    with pytest.raises(ValueError, match="two models are called"):
        measure([paths[0]] * 2, SeparationConfig(rows, str(tmp_path / "out"), limit=2, device="cpu"))
    with pytest.raises(ValueError, match="limit is 1"):
        SeparationConfig(rows, limit=1)
    (tmp_path / "one.jsonl").write_text(json.dumps({"question": "a", "answer_matching_behavior": " No"}) + "\n")
    with pytest.raises(ValueError, match=r"no behaviour of .* has questions of both answers"):
        measure(paths[:1], SeparationConfig(str(tmp_path / "one.jsonl")))
