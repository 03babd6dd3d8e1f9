"""Rows become token sequences: borders, EOS and BOS, length limits, order, batches, the report; and the real files load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ogdopt_harness.config.schema import DataConfig
from ogdopt_harness.data.examples import Batch, Example, Pair, collate, load_preferences, load_sft, order, texts

SHARED = Path(__file__).parents[2] / "shared" / "data"
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_EOS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
TWO_BOS = "{{ bos_token }}" + MISTRAL
SENTENCES = [
    "Name a metal.",
    "Iron is a metal.",
    "Wood is no metal, sorry!",
    "Human: Assistant: user assistant yes no",
    "[INST] [/INST]",
]
USER = {"role": "user", "content": "Name a metal."}
IRON = {"role": "assistant", "content": "Iron."}
WOOD = {"role": "assistant", "content": "Wood."}
GOOD = {"prompt": "Name a metal.", "chosen": "Iron.", "rejected": "Wood."}


def wrap(inner: Tokenizer, template: str | None, **special: Any) -> PreTrainedTokenizerFast:
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"} | special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.chat_template = template
    return tokenizer


def byte_level(template: str | None = MISTRAL, adds_bos: bool = True, **special: Any) -> PreTrainedTokenizerFast:
    """A small byte-level BPE, in which every text has tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(SENTENCES * 3, trainer)
    if adds_bos:
        inner.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return wrap(inner, template, **special)


def word_level(template: str | None = MISTRAL) -> PreTrainedTokenizerFast:
    """One token a word, so that lengths can be counted by hand; the word `nothing` has none."""
    words = ["<s>", "</s>", "<pad>", "[INST]", "[/INST]", *"abcdefgh"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    inner.normalizer = normalizers.Replace("nothing", "")
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap(inner, template, unk_token=None)


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    return word_level()


def config(tmp_path: Path, *lines: Any, **options: Any) -> DataConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return DataConfig(train=[str(path)], **options)


def one(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, line: Any, **options: Any) -> tuple[Example, dict[str, Any]]:
    """The only supervised example of a one-row file, and what the report notes."""
    (example,), report = load_sft(config(tmp_path, line, **options), tokenizer, "train")
    return example, report.as_dict()["noted"]


def shown(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


# --- templates, borders, EOS, BOS ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "adds_bos", "line", "prompt", "completion"),
    [
        (MISTRAL, True, {"messages": [USER, IRON]}, "<s>[INST] Name a metal. [/INST]", " Iron.</s>"),
        (MISTRAL, True, {"prompt": "Name a metal.", "completion": "Iron."}, "<s>[INST] Name a metal. [/INST]", " Iron.</s>"),
        (MISTRAL, True, {"prompt": [USER], "completion": "Iron."}, "<s>[INST] Name a metal. [/INST]", " Iron.</s>"),
        (MISTRAL, True, {"prompt": "a", "completion": "Iron.</s>"}, "<s>[INST] a [/INST]", " Iron.</s>"),
        (MISTRAL, True, {"text": "Iron."}, "<s>", "Iron.</s>"),
        (TWO_BOS, True, {"prompt": "a", "completion": "Iron."}, "<s>[INST] a [/INST]", " Iron.</s>"),
        (CHATML, True, {"prompt": "a", "completion": "Iron."}, "<|im_start|>user\na</s>\n<|im_start|>assistant\n", "Iron.</s>"),
        (NO_EOS, True, {"prompt": "a", "completion": "Iron."}, "user: a\nassistant:", " Iron.\n</s>"),
        (None, True, {"prompt": "Name a metal. ", "completion": "Iron."}, "<s>Name a metal. ", "Iron.</s>"),
        (None, True, {"prompt": "<s>Name a metal.", "completion": " Iron.</s></s>"}, "<s>Name a metal.", " Iron.</s>"),
        (None, False, {"prompt": "Name a metal.", "completion": " Iron."}, "Name a metal.", " Iron.</s>"),
        (None, False, {"text": "Iron."}, "", "Iron.</s>"),
        (
            MISTRAL,
            True,
            {"prompt": "\n\nHuman: a\n\nAssistant: b \n\nHuman:  c\n\nAssistant:", "completion": " Iron. "},
            "<s>[INST] a [/INST] b</s>[INST] c [/INST]",
            " Iron.</s>",
        ),
        (None, True, {"prompt": "\n\nHuman: a\n\nAssistant:", "completion": " b "}, "<s>\n\nHuman: a\n\nAssistant:", " b </s>"),
    ],
)
def test_what_the_model_sees(
    tmp_path: Path, template: str | None, adds_bos: bool, line: Any, prompt: str, completion: str
) -> None:
    tokenizer = byte_level(template, adds_bos)
    example, _ = one(tmp_path, tokenizer, line)
    assert shown(tokenizer, example.prompt_ids + example.completion_ids) == prompt + completion
    assert shown(tokenizer, example.completion_ids).lstrip() == completion.lstrip()  # a space may belong to either side
    assert example.completion_ids.count(2) == 1 and example.completion_ids[-1] == 2
    assert (example.prompt_ids + example.completion_ids).count(1) == prompt.count("<s>")


def test_a_token_across_the_border_is_the_completions_and_is_counted(tmp_path: Path) -> None:
    """'Name a ' + 'metal.' is tokenized as 'Name', ' a', ' metal', not as 'Name', ' a', ' ', 'metal': trl#2054."""
    tokenizer = byte_level(None)
    example, noted = one(tmp_path, tokenizer, {"prompt": "Name a ", "completion": "metal."})
    joint = tokenizer("Name a metal.", add_special_tokens=False).input_ids
    assert [*example.prompt_ids, *example.completion_ids] == [1, *joint, 2]
    assert shown(tokenizer, example.completion_ids) == " metal.</s>"
    assert noted["prompt tokens change next to the completion"]["count"] == 1


def test_a_pair_has_one_border(tmp_path: Path) -> None:
    """Only the chosen answer merges with the prompt's last space; both completions start at the same token."""
    tokenizer = byte_level(None)
    preferences, _ = load_preferences(
        config(tmp_path, {"prompt": "Name a ", "chosen": "metal.", "rejected": "1st."}), tokenizer, "train"
    )
    (winner,), (loser,) = preferences.winners, preferences.losers
    assert winner.prompt_ids == loser.prompt_ids
    assert shown(tokenizer, winner.completion_ids) == " metal.</s>"
    assert shown(tokenizer, loser.completion_ids) == " 1st.</s>"


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)


@given(prompt=TEXT, completion=TEXT, template=st.sampled_from([None, MISTRAL, CHATML]))
def test_no_text_is_lost(tmp_path_factory: pytest.TempPathFactory, prompt: str, completion: str, template: str | None) -> None:
    tokenizer = TOKENIZERS[template]
    options: dict[str, Any] = {"on_bad_row": "skip"}
    try:
        example, _ = one(tmp_path_factory.mktemp("data"), tokenizer, {"prompt": prompt, "completion": completion}, **options)
    except ValueError as error:
        assert "prompt repeated" in str(error) or "differ" in str(error)
        return
    text = tokenizer.decode(example.prompt_ids + example.completion_ids, skip_special_tokens=True)
    assert prompt in text and completion in text
    assert example.completion_ids[-1] == tokenizer.eos_token_id


TOKENIZERS = {template: byte_level(template) for template in (None, MISTRAL, CHATML)}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"prompt": "a", "completion": "nothing"}, "empty completion"),
        ({"prompt": "a", "completion": "</s>"}, "empty completion"),
        ({"messages": [{"role": "system", "content": "s"}, USER, IRON]}, "refused by the chat template"),
        ({"prompt": "\n\nHuman: a\n\nHuman: b\n\nAssistant:", "completion": "c"}, "roles do not alternate"),
        ({"prompt": "\n\nHuman: a\n\nAssistant: b", "completion": "c"}, "prompt ends with the assistant"),
    ],
)
def test_what_only_the_tokenizer_can_tell(tmp_path: Path, words: PreTrainedTokenizerFast, line: Any, reason: str) -> None:
    good = {"prompt": "a", "completion": "b"}
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: {reason}"):
        load_sft(config(tmp_path, good, line), words, "train")
    examples, report = load_sft(config(tmp_path, good, line, on_bad_row="skip"), words, "train")
    assert len(examples) == 1
    assert report.dropped[reason].places == [f"{tmp_path / 'rows.jsonl'}:2"]


def test_answers_that_the_tokenizer_cannot_tell_apart(tmp_path: Path, words: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "b nothing"}
    with pytest.raises(ValueError, match="chosen and rejected are identical"):
        load_preferences(config(tmp_path, row), words, "train")


def test_tokenizers_that_cannot_do_the_job(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        load_sft(config(tmp_path, {"messages": [USER, IRON]}), byte_level(None), "train")
    with pytest.raises(ValueError, match="has no EOS token"):
        load_sft(config(tmp_path, {"text": "a"}), byte_level(eos_token=None), "train")


# --- preferences ---------------------------------------------------------------------------------------------------------


def test_paired_rows_become_winners_and_losers(tmp_path: Path, bpe: PreTrainedTokenizerFast) -> None:
    implicit = {"chosen": [USER, WOOD], "rejected": [USER, IRON]}
    preferences, report = load_preferences(config(tmp_path, GOOD, implicit), bpe, "train")
    assert preferences.paired
    assert [shown(bpe, example.completion_ids) for example in preferences.winners] == [" Iron.</s>", " Wood.</s>"]
    assert [shown(bpe, example.completion_ids) for example in preferences.losers] == [" Wood.</s>", " Iron.</s>"]
    assert preferences.winners[0].prompt_ids == preferences.losers[1].prompt_ids
    assert (report.read, report.used, report.formats) == (2, 2, {"chosen/rejected": 2})


def test_labelled_rows_need_no_partner(tmp_path: Path, bpe: PreTrainedTokenizerFast) -> None:
    labelled = [{"prompt": "a", "completion": f"b{i}", "label": i != 1} for i in range(3)]
    preferences, _ = load_preferences(config(tmp_path, *labelled), bpe, "train")
    assert not preferences.paired
    assert [len(preferences.winners), len(preferences.losers)] == [2, 1]
    with pytest.raises(ValueError, match="every label is True"):
        load_preferences(config(tmp_path, labelled[0]), bpe, "train")
    with pytest.raises(ValueError, match="mixes"):
        load_preferences(config(tmp_path, *labelled, GOOD), bpe, "train")


def test_a_pair_is_two_examples() -> None:
    pair = Pair([1], [2], [3])
    assert (pair.chosen, pair.rejected) == (Example([1], [2]), Example([1], [3]))


# --- limits --------------------------------------------------------------------------------------------------------------

PLAIN = {"prompt": "a b c d", "completion": "e f g h"}  # <s> [INST] a b c d [/INST] | e f g h </s>: 7 + 5 tokens


def test_rows_at_the_limit_are_kept_and_one_token_longer_is_dropped(tmp_path: Path, words: PreTrainedTokenizerFast) -> None:
    short = {"prompt": "a", "completion": "b"}
    for limits, reason in (
        ({"max_length": 12, "max_prompt_length": 7}, None),
        ({"max_length": 11, "max_prompt_length": 7}, "longer than max_length 11"),
        ({"max_length": 12, "max_prompt_length": 6}, "longer than max_prompt_length 6"),
    ):
        examples, report = load_sft(config(tmp_path, short, PLAIN, **limits), words, "train")
        assert len(examples) == (2 if reason is None else 1)
        assert [*report.dropped] == ([] if reason is None else [reason])
        assert report.read == 2 and report.used == len(examples)


def test_one_long_answer_drops_the_pair(tmp_path: Path, words: PreTrainedTokenizerFast) -> None:
    rows = {"prompt": "a", "chosen": "b", "rejected": "b c d e f g"}, {"prompt": "a", "chosen": "b", "rejected": "c"}
    preferences, report = load_preferences(config(tmp_path, *rows, max_length=8), words, "train")
    assert len(preferences.winners) == len(preferences.losers) == 1
    assert report.dropped["longer than max_length 8"].count == 1


def test_long_rows_can_be_an_error(tmp_path: Path, words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: longer than max_length 10: found 12 tokens; raise max_length"):
        load_sft(config(tmp_path, PLAIN, max_length=10, on_long_row="error"), words, "train")


def test_truncation_keeps_the_prompts_end_and_the_completions_start(tmp_path: Path, words: PreTrainedTokenizerFast) -> None:
    limits: dict[str, Any] = {"on_long_row": "truncate", "max_prompt_length": 4, "max_length": 6}
    example, noted = one(tmp_path, words, PLAIN, **limits)
    assert shown(words, example.prompt_ids) == "<s> c d [/INST]"
    assert shown(words, example.completion_ids) == "e f"
    assert noted["completion cut, ends without EOS"]["count"] == noted["prompt cut at its start"]["count"] == 1
    example, noted = one(tmp_path, words, PLAIN, on_long_row="truncate", max_prompt_length=7, max_length=11)
    assert shown(words, example.completion_ids) == "e f g h"  # only the EOS is lost, and that is counted too
    assert [*noted] == ["completion cut, ends without EOS"]


def test_answers_that_differ_behind_the_cut_are_left_out(tmp_path: Path, words: PreTrainedTokenizerFast) -> None:
    rows = {"prompt": "a", "chosen": "b c d", "rejected": "b c e"}, {"prompt": "a", "chosen": "b c", "rejected": "d"}
    options: dict[str, Any] = {"on_long_row": "truncate", "max_prompt_length": 4, "max_length": 6}
    preferences, report = load_preferences(config(tmp_path, *rows, **options), words, "train")
    assert len(preferences.winners) == 1
    assert report.dropped["chosen and rejected are identical once cut"].count == 1
    assert "completion cut, ends without EOS" in report.noted


def test_truncation_that_leaves_no_room_is_refused(tmp_path: Path, words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="max_prompt_length is 8 and max_length 8"):
        load_sft(config(tmp_path, PLAIN, on_long_row="truncate", max_prompt_length=8, max_length=8), words, "train")


@given(
    lengths=st.tuples(*[st.integers(1, 12)] * 3),
    limits=st.tuples(st.integers(1, 8), st.integers(2, 16)).filter(lambda pair: pair[0] < pair[1]),
)
def test_truncated_rows_obey_both_limits(
    tmp_path_factory: pytest.TempPathFactory, lengths: tuple[int, int, int], limits: tuple[int, int]
) -> None:
    prompt, chosen, rejected = (letter * n for letter, n in zip(("a ", "b ", "c "), lengths, strict=True))
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    settings = config(
        tmp_path_factory.mktemp("data"), row, on_long_row="truncate", max_prompt_length=limits[0], max_length=limits[1]
    )
    preferences, report = load_preferences(settings, word_level(), "train")
    for example in (preferences.winners[0], preferences.losers[0]):
        assert 1 <= len(example.prompt_ids) <= limits[0]
        assert 1 <= len(example.completion_ids) <= limits[1] - len(example.prompt_ids)
        assert example.prompt_ids[0] == 0
    cut = any(example.completion_ids[-1] != 1 for example in (preferences.winners[0], preferences.losers[0]))
    assert ("completion cut, ends without EOS" in report.noted) == cut


# --- errors and the report -----------------------------------------------------------------------------------------------


def test_one_error_tells_of_all_bad_rows(tmp_path: Path, bpe: PreTrainedTokenizerFast) -> None:
    rows = [GOOD, *[GOOD | {"chosen": ""}] * 12, "{", GOOD]
    with pytest.raises(ValueError) as error:
        load_preferences(config(tmp_path, *rows), bpe, "train")
    message = str(error.value)
    assert message.startswith("preference.data.train: 13 of 15 rows cannot be used\n")
    assert "rows.jsonl:2: empty completion: column 'chosen': found ''; expected text" in message
    assert "rows.jsonl:14: invalid JSON" in message and message.count("rows.jsonl:") == 4  # three of a kind are enough
    assert "in all: 12 empty completion, 1 invalid JSON" in message
    assert message.endswith("correct these rows, or leave them out with `preference.data.on_bad_row: skip`")


def test_ten_problems_are_enough(tmp_path: Path, bpe: PreTrainedTokenizerFast) -> None:
    kinds = [{"chosen": ""}, {"chosen": 1}, {"chosen": []}, {"chosen": "Wood."}, {"prompt": ""}]
    with pytest.raises(ValueError, match="15 of 16 rows") as error:
        load_preferences(config(tmp_path, GOOD, *[GOOD | kind for kind in kinds for _ in range(3)]), bpe, "train")
    assert str(error.value).count("rows.jsonl:") == 10


def test_skipped_rows_are_reported(tmp_path: Path, bpe: PreTrainedTokenizerFast) -> None:
    rows = [GOOD, *[GOOD | {"chosen": ""}] * 5, "{"]
    preferences, report = load_preferences(config(tmp_path, *rows, on_bad_row="skip"), bpe, "train")
    assert len(preferences.winners) == report.used == 1
    assert report.read == report.used + sum(note.count for note in report.dropped.values())
    path = tmp_path / "rows.jsonl"
    plain = report.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["dropped"]["empty completion"] == {"count": 5, "places": [f"{path}:{i}" for i in (2, 3, 4)]}
    size = f"{report.tokens} tokens, longest {report.longest}"
    assert report.summary().splitlines() == [
        f"preference.data.train: 1 of 7 rows used (1 chosen/rejected), {size}",
        f"  left out, empty completion: 5 ({path}:2, {path}:3, {path}:4, ...)",
        f"  left out, invalid JSON: 1 ({path}:7)",
    ]


@pytest.mark.parametrize("rows", [[], ["{", GOOD | {"chosen": " "}]])
def test_nothing_left_is_an_error_with_the_counts(tmp_path: Path, bpe: PreTrainedTokenizerFast, rows: list[Any]) -> None:
    with pytest.raises(ValueError) as error:
        load_preferences(config(tmp_path, *rows, on_bad_row="skip"), bpe, "train")
    message = str(error.value)
    assert (
        ("1 invalid JSON, 1 empty completion" in message and "no row is left" in message) if rows else "no row found" in message
    )


def test_long_rows_do_not_hide_bad_ones(tmp_path: Path, words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="1 of 22 rows cannot be used") as error:
        load_sft(config(tmp_path, *[PLAIN] * 20, "{", {"prompt": "a", "completion": "b"}, max_length=8), words, "train")
    assert "rows.jsonl:21: invalid JSON" in str(error.value)
    assert "longer than" not in str(error.value)


def test_the_first_rows_alone(tmp_path: Path, bpe: PreTrainedTokenizerFast) -> None:
    rows = [GOOD | {"chosen": f"Iron {i}."} for i in range(600)]  # more than the rows of one tokenizer call
    preferences, report = load_preferences(config(tmp_path, *rows, max_train_rows=500), bpe, "train")
    assert report.read == len(preferences.winners) == 500
    assert shown(bpe, preferences.winners[499].completion_ids) == " Iron 499.</s>"


def test_texts_for_a_tokenizer(tmp_path: Path) -> None:
    dialogue = {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "completion": "d"}
    settings = config(tmp_path, {"messages": [USER, IRON]}, {"text": "x"}, dialogue, "{")
    assert list(texts(settings, "train", "sft")) == ["Name a metal.\nIron.", "x", "a\nb\nc\nd"]
    assert list(texts(config(tmp_path, GOOD), "train", "preference")) == ["Name a metal.\nIron.\nWood."]


# --- order and batches ---------------------------------------------------------------------------------------------------


@given(n=st.integers(0, 50), seed=st.integers(0, 2**32), epoch=st.integers(0, 100))
def test_order_is_a_permutation_and_a_pure_function(n: int, seed: int, epoch: int) -> None:
    assert sorted(order(n, seed, epoch)) == list(range(n))
    assert order(n, seed, epoch) == order(n, seed, epoch)
    assert all(type(i) is int for i in order(n, seed, epoch))


def test_orders_differ_between_epochs_and_seeds() -> None:
    assert len({tuple(order(100, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_collate_by_hand() -> None:
    batch = collate([Example([5, 6], [7, 9]), Example([], [8, 9]), Example([5], [9])], pad_id=9)
    assert batch.input_ids.tolist() == [[5, 6, 7, 9], [8, 9, 9, 9], [5, 9, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert batch.loss_mask.tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 1, 0, 0]]  # the real EOS is scored, the padding is not
    everything = collate([Example([5, 6], [7, 9]), Example([5], [9])], pad_id=9, train_on_prompt=True)
    assert everything.loss_mask.tolist() == [[0, 1, 1, 1], [0, 1, 0, 0]]
    with pytest.raises(ValueError, match="no examples"):
        collate([], 0)


IDS = st.lists(st.integers(0, 99), max_size=6)


@given(st.lists(st.builds(Example, IDS, IDS.filter(bool)), min_size=1, max_size=5), st.booleans())
def test_collate_gives_the_examples_back(examples: list[Example], train_on_prompt: bool) -> None:
    batch = collate(examples, pad_id=0, train_on_prompt=train_on_prompt).to("cpu")
    assert isinstance(batch, Batch)
    assert (batch.input_ids.dtype, batch.attention_mask.dtype, batch.loss_mask.dtype) == (torch.long, torch.long, torch.bool)
    for example, ids, mask, scored in zip(examples, *batch, strict=True):
        whole = example.prompt_ids + example.completion_ids
        assert ids[mask.bool()].tolist() == whole
        first = 1 if train_on_prompt else max(1, len(example.prompt_ids))
        assert scored.nonzero().flatten().tolist() == list(range(first, len(whole)))


# --- real data -----------------------------------------------------------------------------------------------------------

HUB = {  # file -> kind, columns, rows that only an empty or repeated answer may cost
    "Anthropic__hh-rlhf": ("preference", {}),
    "CarperAI__openai_summarize_comparisons": ("preference", {}),
    "Dahoas__rm-hh-rlhf": ("preference", {}),
    "Magpie-Align__Magpie-Llama-3.1-Pro-DPO-100K-v0.1": ("preference", {"prompt": "instruction"}),
    "vicgalle__alpaca-gpt4": ("sft", {"prompt": "instruction", "input": "input", "completion": "output"}),
    "openai__gsm8k": ("sft", {"prompt": "question", "completion": "answer"}),
    "mteb__tweet_sentiment_extraction": ("sft", {"prompt": "text", "completion": "label_text"}),
}


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data at {SHARED}")
@pytest.mark.parametrize("template", [None, MISTRAL])
@pytest.mark.parametrize("name", HUB)
def test_hub_rows_load_by_columns_alone(name: str, template: str | None) -> None:
    if template is None and name.startswith("Magpie"):
        pytest.skip("messages need a chat template")
    kind, columns = HUB[name]
    path = SHARED / "hub_format" / f"{name}.jsonl"
    settings = DataConfig(train=[str(path)], columns=columns, max_length=100_000, max_prompt_length=100_000)
    load = load_sft if kind == "sft" else load_preferences
    _, report = load(settings, TOKENIZERS[template], "train")
    assert report.used == report.read == sum(1 for _ in path.open("rb"))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data at {SHARED}")
@pytest.mark.parametrize("name", [path.name for path in sorted(SHARED.glob("preference/*"))] or ["none"])
def test_preference_files_load_as_they_are(name: str) -> None:
    limits: dict[str, Any] = {"max_length": 100_000, "max_prompt_length": 100_000, "max_train_rows": 150, "on_bad_row": "skip"}
    template = MISTRAL.replace("raise_exception('no system messages')", "messages[0].content")
    tokenizer = TOKENIZERS.setdefault(template, byte_level(template))
    preferences, report = load_preferences(DataConfig(train=[str(SHARED / "preference" / name)], **limits), tokenizer, "train")
    print(report.summary())
    assert report.used >= 0.98 * report.read
    for winner, loser in zip(preferences.winners, preferences.losers, strict=True):
        assert winner.prompt_ids == loser.prompt_ids and winner.completion_ids != loser.completion_ids
        assert winner.prompt_ids.count(1) == 1 and winner.completion_ids.count(2) == loser.completion_ids.count(2) == 1
