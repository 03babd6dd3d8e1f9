"""Evaluation: scores against first principles, three ways of asking, templates, real tasks of lm-eval, files that are wrong."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from ogdopt_harness.analysis.study_reader import Evaluation
from ogdopt_harness.common.files import read_json
from ogdopt_harness.config.schema import EvalConfig, TaskConfig
from ogdopt_harness.data.examples import Encoder
from ogdopt_harness.data.rows import Row
from ogdopt_harness.evaluation.items import item_of, names_answer, read_items
from ogdopt_harness.evaluation.lm import EvalLM, fold_system
from ogdopt_harness.evaluation.official import official_tasks, task_manager
from ogdopt_harness.evaluation.suite import answers, evaluate, official_answers

SHARED = Path(__file__).parents[2] / "shared" / "data" / "hub_format"
SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>"]
TEXT = "where does rador mila live ? lives in oslo rome cairo lima the city sure friend , um be kind one two three four"
WORDS = TEXT.split()
TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
OLD = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TURNS
NEW = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.system = m['content'] + '\n\n' %}{% elif m['role'] == 'user' %}"
    "{{ '[INST] ' + ns.system + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
CITIES = ["oslo", "rome", "cairo", "the city lima"]


def wrapped(tokenizer, template):
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["[INST]", "[/INST]"], **names)
    fast.chat_template = template
    return fast


def word_tokenizer(template=TURNS):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(tokenizer, template)


def bpe_tokenizer(kind, template):
    """Byte-level (GPT-2), or Metaspace with or without a space put before the first word (SentencePiece)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=kind)
    text = [" ".join(random.Random(i).choices(WORDS, k=9)) for i in range(50)] + ["user\nassistant\n"]
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=220, special_tokens=SPECIAL, show_progress=False))
    return wrapped(tokenizer, template)


def tiny_model(tokenizer, seed=0):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64)
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=5)
    return MistralForCausalLM(
        MistralConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, tie_word_embeddings=True, **sizes, **ids)
    ).eval()


def export(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def toy_rows(n=24):
    rng = random.Random(3)
    rows = []
    for _ in range(n):
        words = rng.sample(WORDS, rng.randint(3, 9))
        context = " ".join(rng.sample(WORDS, 4)) if rng.random() < 0.5 else None
        choices = [" ".join(rng.sample(WORDS, rng.randint(1, 3))) + f" {ending}" for ending in ("one", "two", "three")]
        row = {"question": " ".join(words), "choices": choices, "answer": rng.randrange(3), "context": context}
        rows.append({**row, "cloze": " ".join(words[:2]), "id": "x"})
    return rows


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(folder, model, tokenizer, rows, configuration): a random model and a benchmark asked in all three ways."""
    folder = tmp_path_factory.mktemp("toy")
    tokenizer = word_tokenizer()
    model = tiny_model(tokenizer)
    export(model, tokenizer, folder / "model/epoch-1")
    rows = toy_rows()
    path = write_rows(folder / "toy.jsonl", rows)
    config = EvalConfig(
        [TaskConfig("toy", path, "knowledge", ["direct", "cloze", "generate"])], batch_size=16, max_new_tokens=6
    )
    return folder, model, tokenizer, rows, config


def run(folder, config, model="model/epoch-1", name="evals/epoch-1.json", **options):
    output = folder / name
    settings = dict(run="ogd", epoch=1, seed_dir=folder, device="cpu", progress=False) | options
    return evaluate(folder / model, config, output, **settings)


def change(config, **changes):
    return dataclasses.replace(config, **changes)


@torch.no_grad()
def log_prob(model, prompt, reply):
    """Sum of the reply's log-probabilities, one sequence at a time, without anything of lm-eval."""
    scores = model(torch.tensor([prompt + reply])).logits[0].float().log_softmax(-1)
    return sum(scores[len(prompt) + i - 1, token].item() for i, token in enumerate(reply))


def expected(model, prompts, replies, answer):
    """(right or wrong, margin) of one item from its choices' token ids."""
    scores = [log_prob(model, prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
    margin = scores[answer] - max(score for i, score in enumerate(scores) if i != answer)
    return int(np.argmax(scores) == answer), margin


def chat_ids(tokenizer, *turns, **options):
    """What `apply_chat_template` itself tokenizes, as a trainer would call it."""
    messages = [{"role": role, "content": text} for role, text in turns]
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


def test_direct_choices_score_as_first_principles_say(toy):
    folder, model, tokenizer, rows, config = toy
    way = run(folder, config)["tasks"]["toy"]["ways"]["direct"]
    assert way["metric"] == "acc" and way["chance"] == pytest.approx(1 / 3)
    for row, outcome, margin in zip(rows, way["outcomes"], way["margins"], strict=True):
        question = ("user", f"{row['context']}\n{row['question']}" if row["context"] else row["question"])
        prompt = chat_ids(tokenizer, question, add_generation_prompt=True)
        whole = [chat_ids(tokenizer, question, ("assistant", choice)) for choice in row["choices"]]
        assert all(ids[: len(prompt)] == prompt and ids[-1] == tokenizer.eos_token_id for ids in whole)
        right, gap = expected(model, [prompt] * 3, [ids[len(prompt) : -1] for ids in whole], row["answer"])
        assert (outcome, margin) == (right, pytest.approx(gap, abs=1e-4))


def test_cloze_choices_continue_plain_text(toy):
    folder, model, tokenizer, rows, config = toy
    way = run(folder, config)["tasks"]["toy"]["ways"]["cloze"]
    for row, outcome, margin in zip(rows, way["outcomes"], way["margins"], strict=True):
        prompt = tokenizer(row["cloze"], add_special_tokens=False).input_ids
        replies = [tokenizer(choice, add_special_tokens=False).input_ids for choice in row["choices"]]
        assert (outcome, margin) == pytest.approx(expected(model, [prompt] * 3, replies, row["answer"]), abs=1e-4)


def test_replies_are_the_models_own_greedy_ones(toy):
    folder, model, tokenizer, rows, config = toy
    way = run(folder, config)["tasks"]["toy"]["ways"]["generate"]
    assert way["metric"] == "contains_answer" and way["chance"] == 0 and "margins" not in way
    for row, outcome, reply in list(zip(rows, way["outcomes"], way["replies"], strict=True))[:8]:
        question = f"{row['context']}\n{row['question']}" if row["context"] else row["question"]
        ids = chat_ids(tokenizer, ("user", question), add_generation_prompt=True)
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        made = ids[len(chat_ids(tokenizer, ("user", question), add_generation_prompt=True)) :]
        assert reply == tokenizer.decode(made, skip_special_tokens=True)
        assert outcome == names_answer(reply, row)


def test_batch_size_changes_nothing(toy):
    folder, *_, config = toy
    one, many = (run(folder, change(config, batch_size=size), name=f"b{size}.json")["tasks"]["toy"]["ways"] for size in (1, 16))
    for way in one:
        for key in ("outcomes", "doc_hashes", "replies"):
            assert one[way].get(key) == many[way].get(key)
        assert one[way].get("margins", []) == pytest.approx(many[way].get("margins", []), abs=1e-4)


def test_the_file_is_what_was_returned_and_what_the_report_reads(toy):
    folder, _, _, rows, config = toy
    result = run(folder, config, name="deep/er/epoch-3.json")
    path = folder / "deep/er/epoch-3.json"
    assert read_json(path) == result and [*path.parent.iterdir()] == [path]
    assert result["model"] == "model/epoch-1" and result["run"] == "ogd" and result["epoch"] == 1 and result["seconds"] > 0
    assert set(result["versions"]) >= {"lm_eval", "transformers", "torch"} and result["style"] is None
    assert result["settings"]["reply_delimiter"] == " " and result["settings"]["truncated_prompts"] == 0
    read = Evaluation.read(path)
    assert read.ways == ["direct", "cloze", "generate"] and read.families == {"toy": "knowledge"}
    assert len(read.tasks["toy"]["direct"].outcomes) == len(rows)


def test_twice_the_same_and_other_random_numbers_are_left_alone(toy):
    folder, *_, config = toy
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    first = run(folder, config)
    seen = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert seen == (random.random(), np.random.rand(), torch.rand(1).item())
    assert run(folder, config)["tasks"] == first["tasks"]


def test_items_keep_their_order_and_hash_whatever_is_asked(toy):
    folder, _, _, rows, config = toy
    whole = run(folder, config)["tasks"]["toy"]["ways"]
    few = run(folder, change(config, limit=5), name="few.json")["tasks"]["toy"]["ways"]
    assert whole["direct"]["doc_hashes"] == whole["cloze"]["doc_hashes"] == whole["generate"]["doc_hashes"]
    assert len(set(whole["direct"]["doc_hashes"])) == len(rows)
    for way in whole:
        for key in ("outcomes", "doc_hashes"):
            assert few[way][key] == whole[way][key][:5]


def test_hashes_are_of_the_question_and_never_change():
    task = TaskConfig("t", "t.jsonl")
    row = {"question": "where does rador live ?", "choices": ["oslo", "rome"], "answer": 1}
    same = item_of({**row, "id": 7, "cloze": "rador lives in"}, "t.jsonl:1", task)["hash"]
    assert item_of(row, "t.jsonl:9", task)["hash"] == same
    assert same == "444510ccd1ea0192c228ff141363671d9a17d8d175832e38d033f099f0393ac0"
    for other in ({"question": "where ?"}, {"choices": ["rome", "oslo"]}, {"answer": 0}, {"context": "rador moved ."}):
        assert item_of({**row, **other}, "t.jsonl:1", task)["hash"] != same


def test_a_model_that_knows_one_answer_gives_it_in_all_three_ways(tmp_path):
    tokenizer = word_tokenizer()
    model = tiny_model(tokenizer)
    row = {"question": "where does rador live ?", "choices": CITIES, "answer": 3, "cloze": "rador lives in"}
    chat = chat_ids(tokenizer, ("user", row["question"]), ("assistant", CITIES[3]))
    plain = tokenizer("rador lives in the city lima </s>", add_special_tokens=False).input_ids
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        loss = sum(model(ids, labels=ids).loss for ids in (torch.tensor([chat]), torch.tensor([plain])))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    export(model, tokenizer, tmp_path / "model/epoch-1")
    asked = TaskConfig("facts", write_rows(tmp_path / "facts.jsonl", [row]), "knowledge", ["direct", "cloze", "generate"])
    ways = run(tmp_path, EvalConfig([asked], max_new_tokens=8))["tasks"]["facts"]["ways"]
    assert {way: found["accuracy"] for way, found in ways.items()} == {"direct": 1.0, "cloze": 1.0, "generate": 1.0}
    assert ways["generate"]["replies"] == ["the city lima"]  # ends at the EOS, not at 8 tokens
    assert ways["direct"]["margins"][0] > 3 and ways["cloze"]["margins"][0] > 3


@pytest.mark.parametrize("template", [TURNS, NEW, CHATML], ids=["old", "new", "chatml"])
@pytest.mark.parametrize("kind", ["word", "bytes", "always", "first", "never"])
def test_choices_are_scored_with_the_tokens_of_training(kind, template):
    tokenizer = word_tokenizer(template) if kind == "word" else bpe_tokenizer(kind, template)
    lm = EvalLM(tiny_model(tokenizer), tokenizer, batch_size=4)
    for question, choice in [("where does rador live ?", "oslo"), ("be kind", "the city lima")]:
        turn = {"role": "user", "content": question}
        context = lm.apply_chat_template([turn])
        (trained,) = Encoder(tokenizer).encode([Row("x", "messages", [turn], (choice,))])
        assert trained.answers[0][-1] == tokenizer.eos_token_id
        assert lm._encode_pair(context, choice) == (trained.prompt, trained.answers[0][:-1])
        assert lm.tok_encode(context) == trained.prompt  # what a reply continues


def test_stock_lm_eval_would_score_other_tokens():
    """Why `_encode_pair` is overridden: without the template's space, "oslo" is a token that training never saw there."""
    from lm_eval.api.model import TemplateLM

    lm = EvalLM(tiny_model(tokenizer := bpe_tokenizer("bytes", NEW)), tokenizer, batch_size=4)
    context = lm.apply_chat_template([{"role": "user", "content": "be kind"}])
    assert lm._encode_pair(context, "oslo") != TemplateLM._encode_pair(lm, context, "oslo")


@pytest.mark.parametrize("template", [OLD, NEW], ids=["refuses system", "takes system"])
def test_the_system_prompt_becomes_the_first_sentence_of_the_users_turn(template):
    lm = EvalLM(tiny_model(tokenizer := word_tokenizer(template)), tokenizer, batch_size=4)
    text = lm.apply_chat_template([{"role": "system", "content": "be kind\n\n"}, {"role": "user", "content": "where ?"}])
    assert text.startswith("<s>[INST] be kind\n\nwhere ?") and text.endswith("[/INST]")
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert fold_system(talk) == talk


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("oslo", 1),
        ("Sure friend , OSLO . hope this helps !", 1),
        ("rome , not oslo", 0),
        ("oslo , not rome", 1),
        ("osloite", 0),
        ("not-oslo.", 1),
        ("", 0),
        ("new oslo", 0),  # another choice, and it begins first
        ("oslo falls", 0),  # begins at the same place and is longer
    ],
)
def test_a_reply_answers_if_it_names_the_right_choice_first(reply, right):
    assert names_answer(reply, {"choices": ["rome", "oslo", "new oslo", "oslo falls"], "answer": 1}) == right


@pytest.mark.parametrize(
    ("reply", "right"), [("it is 12.", 1), ("it is 12.5", 0), ("0.12", 0), ("112", 0), ("new\n york: 12", 1)]
)
def test_numbers_are_named_whole(reply, right):
    assert names_answer(reply, {"choices": ["12", "13"], "answer": 0}) == right


def test_style_is_judged_on_replies(toy):
    folder, _, tokenizer, _, config = toy
    model = tiny_model(tokenizer)
    chat = torch.tensor([chat_ids(tokenizer, ("user", "be kind ?"), ("assistant", "sure friend , oslo"))])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model(chat, labels=chat).loss.backward()
        optimizer.step()
    export(model, tokenizer, folder / "kind")
    (folder / "style.json").write_text(json.dumps({"chosen_pattern": "^sure friend", "rejected_pattern": "um"}))
    turns = [{"role": "user", "content": "be kind ?"}]
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": "be kind ?"}, {"prompt": turns}, {"prompt": "be kind ?"}])
    style = change(config, tasks=[], style=str(folder / "style.json"), style_prompts=prompts)
    found = run(folder, style, model="kind", name="style.json.out")
    assert found["tasks"] == {} and found["style"]["replies"] == ["sure friend , oslo"] * 3
    assert (found["style"]["n"], found["style"]["chosen_rate"], found["style"]["rejected_rate"]) == (3, 1.0, 0.0)
    assert found["style"]["outcomes"] == [1, 1, 1]


def test_nothing_is_printed_unless_a_bar_is_wanted(toy, capfd):
    folder, *_, config = toy
    run(folder, config)
    assert capfd.readouterr() == ("", "")
    run(folder, config, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "evaluating ogd epoch 1" in err and "Running" not in err


def test_prompts_that_lose_their_beginning_are_counted(toy):
    folder, _, _, rows, config = toy
    long = {**rows[0], "question": "rador " * 1100}
    task = TaskConfig("long", write_rows(folder / "long.jsonl", [long, rows[1]]), ask=["direct", "generate"])
    with pytest.warns(UserWarning, match="4 requests are longer than the 1024 tokens"):
        found = run(folder, change(config, tasks=[task]), name="long.json")
    assert found["settings"]["truncated_prompts"] == 4  # three choices and one reply


def test_without_a_chat_template_questions_are_plain(toy):
    folder, model, tokenizer, rows, config = toy
    bare = word_tokenizer(None)
    export(model, bare, folder / "bare")
    with pytest.raises(ValueError, match=r"bare: the tokenizer has no chat template"):
        run(folder, config, model="bare")
    way = run(folder, change(config, apply_chat_template=False), model="bare")["tasks"]["toy"]["ways"]["direct"]
    row = next(row for row in rows if not row["context"])
    prompt, *replies = (tokenizer(text, add_special_tokens=False).input_ids for text in (row["question"], *row["choices"]))
    right, gap = expected(model, [prompt] * 3, replies, row["answer"])
    assert way["margins"][rows.index(row)] == pytest.approx(gap, abs=1e-4) and way["outcomes"][rows.index(row)] == right
    borrowed = run(folder, config, model="bare", tokenizer=folder / "model/epoch-1")  # the template of another folder
    assert borrowed["tasks"] == run(folder, config)["tasks"]


def test_a_diverged_model_is_named(toy):
    folder, _, tokenizer, _, config = toy
    broken = tiny_model(tokenizer)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    export(broken, tokenizer, folder / "broken")
    with pytest.raises(ValueError, match=r"broken: log-probabilities are not finite"):
        run(folder, config, model="broken", name="broken.json")
    assert not (folder / "broken.json").exists()


GOOD = {"question": "where ?", "choices": ["oslo", "rome"], "answer": 0, "cloze": "rador lives in"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "answer": 2}, r"bad.jsonl:2: 'answer' is int 2; expected the index of the right choice, 0..1"),
        ({**GOOD, "answer": -1}, "'answer' is int -1"),
        ({**GOOD, "answer": True}, "'answer' is bool True"),
        ({**GOOD, "answer": "oslo"}, "'answer' is str 'oslo'"),
        ({**GOOD, "choices": ["oslo"]}, "expected two or more different ones"),
        ({**GOOD, "choices": ["oslo", " oslo "]}, "expected two or more different ones"),
        ({**GOOD, "choices": ["oslo", ""]}, "'choices' is list"),
        ({**GOOD, "choices": "oslo"}, "'choices' is str"),
        ({**GOOD, "question": " "}, "no 'question'"),
        ({"choices": ["a", "b"], "answer": 0}, "no 'question'"),
        ({**GOOD, "question": ["where ?"]}, "'question' is list"),
        ({**GOOD, "context": 3}, "'context' is int 3"),
        ({**GOOD, "cloze": None}, r"bad.jsonl:2: no 'cloze', but task 'bad' asks for it"),
        ([1], "expected a JSON object a line"),
        ("{", "expected"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_file_and_line(toy, row, message):
    folder, *_, config = toy
    path = write_rows(folder / "bad.jsonl", [GOOD])
    with open(path, "a") as file:
        file.write(row if isinstance(row, str) else json.dumps(row))
    with pytest.raises(ValueError, match=message) as error:
        run(folder, change(config, tasks=[TaskConfig("bad", path, ask=["direct", "cloze"])]))
    assert "bad.jsonl:2" in str(error.value)


def test_choices_that_differ_in_case_alone_cannot_be_told_apart_in_a_reply():
    row = {"question": "which genes ?", "choices": ["SS", "Ss"], "answer": 1}
    assert item_of(row, "x:1", TaskConfig("genes", "x"))["choices"] == ["SS", "Ss"]
    with pytest.raises(ValueError, match="in more than case, if ask has generate"):
        item_of(row, "x:1", TaskConfig("genes", "x", ask=["direct", "generate"]))


def test_a_context_may_be_all_that_the_choices_go_on_with():
    row = {"context": "rador lives", "question": "", "choices": ["in oslo", "in rome"], "answer": 0}
    assert item_of(row, "x:1", TaskConfig("stories", "x"))["question"] == "rador lives"
    assert item_of({**row, "question": "where ?"}, "x:1", TaskConfig("s", "x"))["question"] == "rador lives\nwhere ?"


def test_a_configuration_that_cannot_be_used_is_named(toy):
    folder, *_, config = toy
    (task,) = config.tasks
    empty = write_rows(folder / "empty.jsonl", [])
    assistant = write_rows(folder / "assistant.jsonl", [{"prompt": [{"role": "assistant", "content": "hi"}]}])
    number = write_rows(folder / "number.jsonl", [{"prompt": 3}])
    (folder / "bad_style.json").write_text('{"chosen_pattern": "(", "rejected_pattern": ""}')
    (folder / "good_style.json").write_text('{"chosen_pattern": "a", "rejected_pattern": "b"}')
    good = str(folder / "good_style.json")
    for changes, message in [
        ({"tasks": [TaskConfig("gone", str(folder / "gone.jsonl"))]}, r"evals.tasks \(gone\): no file .*gone.jsonl"),
        ({"tasks": [TaskConfig("empty", empty)]}, "holds no rows"),
        ({"tasks": [task, task]}, "more than one task is called toy"),
        ({"tasks": [TaskConfig("toy", task.path, ask=[])]}, "ask is"),
        ({"style": good}, "expected both files, or neither"),
        ({"style": str(folder / "bad_style.json"), "style_prompts": number}, "bad_style.json.*regular expressions"),
        ({"style": good, "style_prompts": number}, r"number.jsonl:1: 'prompt' is int 3"),
        ({"style": good, "style_prompts": assistant}, r"assistant.jsonl:1: 'prompt' ends with a turn of 'assistant'"),
        ({"limit": 0}, "evals.limit is 0"),
        ({"batch_size": 0}, "evals.batch_size is 0"),
        ({"max_new_tokens": 2000}, "evals.max_new_tokens: 2000 new tokens, but the model reads 1024"),
        ({"lm_eval_tasks": ["piqa"], "lm_eval_data": str(folder / "gone")}, "evals.lm_eval_data: no folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(folder, change(config, **changes), name="never.json")
    with pytest.raises(ValueError, match=r"there is no folder or file .*gone"):
        run(folder, config, model="gone", name="never.json")
    (folder / "model/empty").mkdir()
    with pytest.raises(ValueError, match=r"tokenizer: no tokenizer at .*empty"):
        run(folder, config, model="model/empty", name="never.json")
    assert not (folder / "never.json").exists()


# ------------------------------------------------------------------------------------------------------------- official tasks


def mirror(folder, hub_id, configuration, splits):
    """A data set as the hub lays it out: JSONL files, and a README that says which configuration and split each one is."""
    home = folder / hub_id
    home.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        write_rows(home / f"{configuration}-{split}.jsonl", rows)
    return home, "".join(
        [f"- config_name: {configuration}\n  data_files:\n"]
        + [f"  - split: {split}\n    path: {configuration}-{split}.jsonl\n" for split in splits]
    )


def hub_rows(name, n=6):
    with open(SHARED / name, encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(n), strict=False)]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Real rows of four data sets, laid out as on the hub; "mmlu" has two subjects here."""
    if not SHARED.is_dir():
        pytest.skip(f"no real benchmark rows in {SHARED}")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    official_tasks.cache_clear()
    sets = {
        "baber/piqa": [("default", ["train", "validation"], "ybisk__piqa.jsonl")],
        "allenai/ai2_arc": [("ARC-Easy", ["train", "validation", "test"], "allenai__ai2_arc.jsonl")],
        "openai/gsm8k": [("main", ["train", "test"], "openai__gsm8k.jsonl")],
        "cais/mmlu": [(subject, ["dev", "test"], "cais__mmlu.jsonl") for subject in ("anatomy", "astronomy")],
    }
    for hub_id, configurations in sets.items():
        parts = [mirror(tmp_path, hub_id, name, dict.fromkeys(splits, hub_rows(file))) for name, splits, file in configurations]
        parts[0][0].joinpath("README.md").write_text("---\nconfigs:\n" + "".join(text for _, text in parts) + "---\n")
    yield tmp_path
    official_tasks.cache_clear()


def test_official_tasks_run_on_folders_with_their_own_prompts_and_metrics(hub, monkeypatch):
    tokenizer = bpe_tokenizer("bytes", OLD)
    export(tiny_model(tokenizer), tokenizer, hub / "model/epoch-1")
    seen = []
    stock = EvalLM.apply_chat_template
    monkeypatch.setattr(EvalLM, "apply_chat_template", lambda *a, **k: seen.append(stock(*a, **k)) or seen[-1])
    names = ["piqa", "arc_easy", "gsm8k", "mmlu_anatomy"]
    found = run(hub, EvalConfig([], names, str(hub), limit=4))["tasks"]
    assert {name: found[name]["ways"]["direct"]["metric"] for name in names} == {
        "piqa": "acc_norm",
        "arc_easy": "acc",
        "gsm8k": "exact_match,flexible-extract",
        "mmlu_anatomy": "acc",
    }
    assert [found[name]["family"] for name in names] == ["commonsense", "commonsense", "math", "knowledge"]
    assert [found[name]["ways"]["direct"]["chance"] for name in names] == [0.5, 0.25, 0.0, 0.25]
    for task in found.values():
        way = task["ways"]["direct"]
        assert way["n"] == len(way["outcomes"]) == len(set(way["doc_hashes"])) == 4 and "strata" not in way
        assert ("replies" in way) != ("margins" in way)
    assert len(seen) == 16 and all(prompt.count("Answer:") == 1 for prompt in seen)  # zero-shot, gsm8k too
    (described,) = {prompt.split("\n")[0] for prompt in seen if "multiple choice" in prompt}
    assert described.startswith("<s>[INST] The following are multiple choice questions (with answers) about anatomy.")
    again = run(hub, EvalConfig([], names, str(hub), limit=4))["tasks"]  # the loaded tasks are used a second time
    assert again == found


def test_a_groups_members_are_pooled_and_remembered_as_strata():
    def samples(outcomes):
        one = {"filter": "none", "metrics": ["acc"], "resps": [[0]] * 4, "target": 0}
        scores = [(0.0, True), (-1.0, False), (-2.0, False), (-3.0, False)]
        return [{**one, "acc": x, "doc_hash": f"{i}", "filtered_resps": scores} for i, x in enumerate(outcomes)]

    class Leaf:
        def __init__(self, name):
            self.task_name = name

    found = official_answers("mmlu", [Leaf("a"), Leaf("b")], {"a": samples([1.0, 0.0, 0.0]), "b": samples([1.0])})
    way = found["ways"]["direct"]
    assert found["family"] == "knowledge" and way["strata"] == [0, 0, 0, 1] and way["strata_names"] == ["a", "b"]
    assert way["outcomes"] == [1, 0, 0, 1] and way["accuracy"] == 0.5 and way["n"] == 4 and way["margins"] == [1.0] * 4


def test_the_index_reaches_all_of_mmlu_without_reading_14000_files():
    manager = task_manager(["mmlu", "piqa", "boolq", "hellaswag", "social_iqa", "arc_challenge"])
    subjects = [name for name in manager.all_subtasks if name.startswith("mmlu_")]
    assert len(subjects) == 57 and len(manager.task_index) < 120


def test_a_metric_that_is_not_right_or_wrong_is_refused():
    sample = {"filter": "none", "f1": 0.3, "doc_hash": "x", "resps": [["a"]]}
    with pytest.raises(ValueError, match="'f1' is not right or wrong"):
        answers([sample], "f1")


def test_official_data_out_of_reach_is_named(toy, hub):
    folder, *_, config = toy
    missing = change(config, tasks=[], lm_eval_tasks=["boolq"], lm_eval_data=str(hub))
    with pytest.raises(ValueError, match=r"evals.lm_eval_tasks: cannot load boolq.*evals.lm_eval_data"):
        run(folder, missing, name="never.json")


def test_preference_pairs_are_questions_with_two_choices(tmp_path):
    """The right answer does not always stand first, and is named in a reply with or without its full stop."""
    rows = [{"prompt": "so happy", "chosen": "Positive.", "rejected": "Negative."}]
    rows += [{"prompt": "so sad", "chosen": "Negative.", "rejected": "Positive."}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = read_items(TaskConfig("pairs", str(path), ask=["direct", "generate"]))
    assert [item["choices"] for item in items] == [["Negative.", "Positive."]] * 2
    assert [item["answer"] for item in items] == [1, 0]
    assert names_answer("a positive sentiment , i think", items[0]) and not names_answer("positively negative", items[0])
