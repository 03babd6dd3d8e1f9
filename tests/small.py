"""A tiny tokenizer, model and data set for the harness's tests, built in milliseconds."""

import random

import torch

from ogdopt_harness.config.schema import DataConfig, ModelConfig, PreferenceConfig
from ogdopt_harness.data.examples import Example, Preferences
from ogdopt_harness.modeling.build import build_model
from ogdopt_harness.modeling.tokenizer import train_tokenizer
from ogdopt_harness.training.progress import Signals, Speed

TEXT = "where does lives in what is the of a sure friend um whatever rador mila oslo rome cairo lima ? . ,"
WORDS = TEXT.split()
ARCHITECTURE = {
    "model_type": "mistral",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
MODEL = ModelConfig(None, ARCHITECTURE, None, "word", 64)


def tokenizer(folder):
    return train_tokenizer([" ".join(WORDS)], MODEL, folder / "tokenizer")


def model(tok, seed=0):
    return build_model(MODEL, tok, seed)


def preferences(tok, n=12, seed=0, paired=True):
    """Winners start with "sure friend", losers with "um"; the word in between is shared."""
    rng = random.Random(seed)
    winners, losers = [], []
    for _ in range(n):
        prompt = f"<s> [INST] {' '.join(rng.choices(WORDS, k=rng.randint(2, 6)))} [/INST]"
        word = rng.choice(WORDS)
        for side, text in ((winners, f"sure friend , {word} . </s>"), (losers, f"um , {word} </s>")):
            ids = [tok(t, add_special_tokens=False).input_ids for t in (prompt, text)]
            side.append(Example(*ids))
    return Preferences(winners, losers if paired else losers[: n // 2], paired)


def stage(**changes):
    options = dict(
        data=DataConfig(), optimizer="RMSprop", learning_rate=1e-3, warmup_steps=2, num_train_epochs=2, train_batch_size=4
    )
    return PreferenceConfig(**(options | dict(per_device_train_batch_size=4, max_grad_norm=10.0, seed=1) | changes))


def vector(m):
    return torch.cat([p.detach().flatten() for p in m.parameters()])


def line(trainer, taken):
    """The figures of a step, as they are logged."""
    speed = Speed()
    speed.lap()
    return trainer.line(taken, Signals(trainer.ranks, []), speed)[0]
