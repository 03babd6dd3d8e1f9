"""Tiny tokenizers and models of any architecture, as their owners would keep them in folders, and studies on them."""

import json
import random
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ogdopt_harness import cli

WORDS = (
    "where does live in what is the of a sure friend um whatever rador mila oslo rome cairo lima north south red blue green "
    "old new house tree river stone the city people often say that it rains there in spring"
).split()
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(folder, template=CHATML, eos="<|im_end|>", bos=None, pad="<pad>", vocab=400):
    """A byte-level tokenizer with ChatML's tokens, saved in `folder`."""
    special = [x for x in ("<|im_start|>", "<|im_end|>", eos, bos, pad) if x]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = dict(vocab_size=vocab, special_tokens=list(dict.fromkeys(special)), initial_alphabet=alphabet)
    raw.train_from_iterator([" ".join(WORDS)] * 3, trainers.BpeTrainer(show_progress=False, **options))
    names = {name: token for name, token in (("bos_token", bos), ("pad_token", pad)) if token}
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, clean_up_tokenization_spaces=False, **names)
    made.chat_template = template
    made.save_pretrained(folder)
    return made


def config(kind="llama", vocab=512, **changes):
    """A tiny configuration; names that an architecture does not know are ignored by it."""
    if kind == "gpt2":
        size = dict(n_embd=32, n_layer=2, n_head=4, n_positions=changes.pop("n_positions", 256))
    else:
        size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
        size |= dict(head_dim=8, max_position_embeddings=256, pad_token_id=None)
    if kind == "opt":
        size |= dict(ffn_dim=64, word_embed_proj_dim=32)
    return AutoConfig.for_model(kind, **(size | dict(vocab_size=vocab, bos_token_id=None, eos_token_id=1) | changes))


def sharper(model, factor=3):
    """The same model with larger matrices, so that its predictions are far from uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
    return model


def model(folder, kind="llama", seed=0, words=True, **changes):
    """A model of any architecture, saved in `folder` with a tokenizer."""
    torch.manual_seed(seed)
    made = sharper(AutoModelForCausalLM.from_config(config(kind, **changes)).eval())
    made.save_pretrained(folder)
    if words:
        tokenizer(folder)
    return made


def pairs(n=16, seed=0):
    """Preference pairs of known words."""
    rng = random.Random(seed)
    some = lambda k: " ".join(rng.choices(WORDS, k=k))  # noqa: E731
    return [dict(prompt=f"{some(6)}?", chosen=f"sure friend {some(4)}", rejected=f"um whatever {some(4)}") for _ in range(n)]


def write(path, rows):
    """Rows as a JSONL file; its path."""
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(folder, model, train, methods=("ogd",), held_out=None, lora=None, **preference):
    """A recipe of one epoch on one process, as a file in `folder`; its path."""
    data = dict(train=[str(train)], eval=[str(held_out)] if held_out else [], max_length=200, max_prompt_length=100)
    stage = dict(optimizer="AdamW", learning_rate=1e-3, warmup_steps=0, num_train_epochs=1, train_batch_size=8)
    settings = {
        "study": {"name": "case", "output_dir": str(Path(folder) / "out")},
        "methods": list(methods),
        "model": {"model_name_or_path": str(model), "lora": lora},
        "sft": {"data": {"train": []}},
        "preference": {"beta": [0.1], "data": data, "per_device_train_batch_size": 8} | stage | preference,
        "evals": {"tasks": []},
        "report_to": ["none"],
        "device": "cpu",
    }
    file = Path(folder) / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return file


def start(_, *words):
    """The exit status of the command, in this process."""
    return cli.answer(["run", *map(str, words)])


def lines(folder, run="ogd"):
    """The metrics of a run of a recipe's study."""
    file = Path(folder) / "out" / "seed-0" / run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]
