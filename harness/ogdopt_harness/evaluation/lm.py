"""The model under evaluation as lm-evaluation-harness sees it: scored with the tokens of training text, replying in batches.

A continuation is scored with the tokens that it has in training text. lm-eval puts "…[/INST]A" before the model where the
template writes "…[/INST] A</s>"; `EvalLM` asks the template what stands between the two and scores that (`reply_delimiter`).
System prompts and task descriptions become the first sentence of the user's turn, as in the paper, also where a template
would refuse them.

The requests are cut into pieces that depend on nothing but the requests. A piece is computed whole, by one of torchrun's
processes, or taken from the journal whole: so the scores are the same, bit for bit, with any number of processes and after any
interruption.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig

from ogdopt_harness.common.journal import Journal
from ogdopt_harness.common.ranks import ALONE, Ranks
from ogdopt_harness.modeling.pretrained import load_pretrained
from ogdopt_harness.modeling.tokenizer import check_vocabulary, load_tokenizer

Messages = list[dict[str, str]]
StockLM: Any = HFLM  # a decorator of lm-eval hides the type of its class
MOST_NEW_TOKENS = 256  # of an official task that does not say
PIECE = 16  # batches that are scored, and kept in the journal, together


def load(
    model: Path | str,
    device: str,
    *,
    tokenizer: Path | str | None = None,
    apply_chat_template: bool,
    device_map: str | None = None,
    option: str = "model",
    ranks: Ranks = ALONE,
) -> tuple[Any, Any]:
    """Model and tokenizer of an exported folder (or a hub id), in the type that the weights are stored in.

    `tokenizer` is another folder or hub id that has it. With `device_map` ("auto") the layers are spread over all devices.
    Raises ValueError where there is no model, no tokenizer, no chat template to apply, or the two do not belong together.
    """
    if device_map is not None and ranks.size > 1:
        raise ValueError(
            f"evals.device_map is {device_map!r}, which spreads one model over all devices, but there are {ranks.size} "
            "processes; start one with python, or let every process have the whole model (evals.device_map null)"
        )
    words = load_words(model, tokenizer, apply_chat_template)
    spread = {"device_map": device_map} if device_map else {}
    loaded: Any = load_pretrained(AutoModelForCausalLM, model, option, dtype="auto", **spread)
    check_vocabulary(words, loaded.get_input_embeddings().weight.shape[0], str(model))
    return (loaded if device_map else loaded.to(device)).eval(), words


def load_words(model: Path | str, tokenizer: Path | str | None, apply_chat_template: bool) -> Any:
    """The tokenizer of `load`."""
    words = load_tokenizer(tokenizer or model, option="tokenizer")
    if apply_chat_template and not words.chat_template:
        raise ValueError(
            f"{tokenizer or model}: the tokenizer has no chat template; choose one that has (model.tokenizer_name_or_path), "
            "or set evals.apply_chat_template to false"
        )
    return words


def reply_delimiter(render: Callable[..., str]) -> str:
    """What the chat template puts between its generation prompt and the reply: " " for "[INST] q [/INST] a</s>".

    "" where the template writes a whole conversation otherwise than it opens a reply.
    """
    question = [{"role": "user", "content": "question"}]
    prompt = render(question, add_generation_prompt=True)
    whole = render([*question, {"role": "assistant", "content": "reply"}], add_generation_prompt=False)
    return whole[len(prompt) : whole.index("reply", len(prompt))] if whole.startswith(prompt) else ""


class EvalLM(StockLM):
    """HFLM that folds system prompts into the user's turn, tokenises replies as in training, and replies in batches.

    Log-softmax in float32: in bfloat16 many choices tie, and a tie goes to the first choice.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int,
        bar: tqdm | None = None,
        journal: Journal | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, softmax_dtype="float32"
        )
        self.templated: dict[str, str] = {}  # rendered conversation -> what stands before its continuation
        self.truncated = 0  # requests that lost their beginning
        self.adds_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        self.delimiter = reply_delimiter(self.render) if tokenizer.chat_template else ""
        self.bar = bar
        self.journal = journal
        self.ranks = ranks
        self.set_cache_hook(Advance(bar))

    def render(self, messages: Messages, **options: Any) -> str:
        """The chat template's text of a conversation. Raises ValueError where the template refuses it."""
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses {str(messages)[:200]}: {error}; change the messages") from error

    def apply_chat_template(self, chat_history: Messages, add_generation_prompt: bool = True) -> str:
        """The rendered conversation, its system prompt folded into the first user's turn; remembered for `_encode_pair`."""
        text = self.render(
            fold_system(chat_history),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        self.templated[text] = self.delimiter if add_generation_prompt else ""
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Token ids as in training: a rendered conversation has its special tokens, plain text gets at most a BOS."""
        ids = super().tok_encode(string, False, **options)
        add = self.adds_bos and add_special_tokens is not False and string not in self.templated
        return [self.tokenizer.bos_token_id, *ids] if add and ids[:1] != [self.tokenizer.bos_token_id] else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context not in self.templated:
            return super()._encode_pair(context, continuation)
        prompt = self.tok_encode(context)
        whole = self.tok_encode(context + self.templated[context] + continuation, add_special_tokens=False)
        # A token may span the border; then the reply starts with it, as in training.
        shared = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        return whole[:shared], whole[shared:]

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None) -> list:
        for (_, choice), _, reply in requests:
            if len(reply) > self.max_length:
                raise ValueError(
                    f"a choice of a benchmark has {len(reply)} tokens, but the model reads {self.max_length} at most: "
                    f"{choice[:80]!r}...; remove that row, or give the model a larger max_position_embeddings"
                )
        self.truncated += sum(len(context) + len(reply) > self.max_length + 1 for _, context, reply in requests)
        whole = [context + reply for _, context, reply in requests]
        order = sorted(range(len(requests)), key=lambda i: (-len(whole[i]), whole[i]))  # lm-eval's own order inside a piece
        size = PIECE * self.batch_size
        pieces = [order[start : start + size] for start in range(0, len(order), size)]
        keys = [_key("loglikelihood", len(reply), ids) for (_, _, reply), ids in zip(requests, whole, strict=True)]

        def score(piece: list[int]) -> list[Any]:
            scores = super(EvalLM, self)._loglikelihood_tokens([requests[i] for i in piece], disable_tqdm=disable_tqdm)
            if not all(math.isfinite(value) for value, _ in scores):  # argmax would quietly answer with the first choice
                raise ValueError(
                    f"{self.model.name_or_path}: log-probabilities are not finite, its training diverged; lower the learning "
                    "rate"
                )
            return scores

        return [tuple(answer) for answer in self._answers(pieces, keys, score)]

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Greedy replies, each up to its end-of-sequence token, a stop string or the most new tokens allowed."""
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        limits = [Stop.of(request.args[1]) for request in requests]
        for limit in set(limits):
            room = self.room(limit)
            self.truncated += sum(len(p) > room for p, its in zip(prompts, limits, strict=True) if its == limit)
        order = sorted(range(len(requests)), key=lambda i: (limits[i], -len(prompts[i]), prompts[i]))
        pieces = []
        while order:
            piece = [i for i in order[: self.batch_size] if limits[i] == limits[order[0]]]
            pieces.append(piece)
            order = order[len(piece) :]
        keys = [_key("generate", limit, prompt) for prompt, limit in zip(prompts, limits, strict=True)]
        return self._answers(pieces, keys, lambda piece: self._reply([prompts[i] for i in piece], limits[piece[0]]))

    def _answers(self, pieces: list[list[int]], keys: list[str], compute: Callable[[list[int]], list[Any]]) -> list[Any]:
        """The answers to all requests, in order: of the journal, of this process or of another one; see the module."""
        if self.bar is not None:
            self.bar.total = (self.bar.total or 0) + sum(map(len, self.ranks.share(pieces)))
            self.bar.refresh()
        known = {} if self.journal is None else self.journal
        answers: dict[int, Any] = {}
        for piece in self.ranks.share(pieces):
            if all(keys[i] in known for i in piece):
                found = [known[keys[i]]["answer"] for i in piece]
                if self.bar is not None:
                    self.bar.update(len(piece))
            else:
                found = compute(piece)
                if self.journal is not None:
                    self.journal.add({"id": keys[i], "answer": answer} for i, answer in zip(piece, found, strict=True))
            answers |= zip(piece, found, strict=True)
        answers = self.ranks.merge(answers)
        return [answers[i] for i in range(len(keys))]

    def room(self, stop: Stop) -> int:
        """How many tokens of a prompt the model can read before such a reply. Raises ValueError if there is none."""
        if self.max_length <= stop.new_tokens:
            raise ValueError(
                f"evals.max_new_tokens: {stop.new_tokens} new tokens, but the model reads {self.max_length}; expected fewer"
            )
        return self.max_length - stop.new_tokens

    def _reply(self, prompts: Sequence[list[int]], stop: Stop) -> list[str]:
        prompts = [prompt[-self.room(stop) :] for prompt in prompts]
        replies = greedy(self.model, self.tokenizer, prompts, stop.new_tokens, stop.strings)
        texts = [postprocess_generated_text(text, list(stop.strings), None) for text in decoded(self.tokenizer, replies)]
        for prompt, text in zip(prompts, texts, strict=True):
            self.cache_hook.add_partial("generate_until", prompt, text)
        return texts


@torch.inference_mode()
def greedy(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], new_tokens: int, stop: Sequence[str] = ()
) -> list[list[int]]:
    """The greedy continuation of each prompt (token ids), at most `new_tokens` long: up to and with an end-of-sequence token.

    The prompts are one batch, padded on the left. It ends early once every reply holds one of the `stop` strings. Each token is
    the argmax of the model's logits: nothing of its own generation configuration counts but the tokens that end a reply.
    """
    width = max(map(len, prompts))
    ends = ends_of(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with generating(model, GenerationConfig(max_new_tokens=new_tokens, pad_token_id=pad, eos_token_id=ends or None)):
        found = model.generate(
            input_ids=ids,
            attention_mask=mask,
            stopping_criteria=stop_sequences_criteria(tokenizer, list(stop), width, len(prompts)) if stop else None,
        )
    replies = found[:, width:].tolist()
    return [reply[: next((i + 1 for i, token in enumerate(reply) if token in ends), len(reply))] for reply in replies]


@contextmanager
def generating(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Replies under this configuration alone: what is unset in one that is passed along comes from the model's own."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def decoded(tokenizer: Any, replies: list[list[int]]) -> list[str]:
    """The texts of replies, without special tokens."""
    return tokenizer.batch_decode(replies, skip_special_tokens=True)


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a reply: the tokenizer's, and those of the model's own generation configuration."""
    own = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})


def _key(kind: str, detail: Any, ids: list[int]) -> str:
    return hashlib.sha256(json.dumps([kind, detail, ids]).encode()).hexdigest()


class Stop(NamedTuple):
    """When a reply ends."""

    new_tokens: int
    strings: tuple[str, ...]

    @classmethod
    def of(cls, options: dict[str, Any]) -> Stop:
        """From a task's `generation_kwargs`. Raises ValueError for a task that samples: replies here are greedy."""
        if options.get("do_sample") or options.get("temperature"):
            raise ValueError(f"a task asks for sampled replies ({options}); expected a greedy one: leave the task out")
        until = options.get("until") or []
        return cls(options.get("max_gen_toks", MOST_NEW_TOKENS), tuple([until] if isinstance(until, str) else until))


class Advance(CacheHook):
    """lm-eval reports every answer to its cache; this one only moves a progress bar."""

    def __init__(self, bar: tqdm | None) -> None:
        super().__init__(None)
        self.bar = bar

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        if self.bar is not None:
            self.bar.update()


def fold_system(messages: Messages) -> Messages:
    """The conversation with its system prompt as the first sentence of the first user's turn."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return messages
    system, user, *others = messages
    return [{"role": "user", "content": f"{system['content'].rstrip()}\n\n{user['content']}"}, *others]
