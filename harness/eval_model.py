"""The model under evaluation as lm-evaluation-harness sees it: scored with the tokens of training text, replying in batches.

A continuation is scored with the tokens that it has in training text. lm-eval puts "…[/INST]A" before the model where the
template writes "…[/INST] A</s>"; `EvalLM` asks the template what stands between the two and scores that (`reply_delimiter`).
System prompts and task descriptions become the first sentence of the user's turn, as in the paper, also where a template
would refuse them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

Messages = list[dict[str, str]]
StockLM: Any = HFLM  # a decorator of lm-eval hides the type of its class
MOST_NEW_TOKENS = 256  # of an official task that does not say


def load(model: Path, device: str, *, tokenizer: Path | None = None, apply_chat_template: bool) -> tuple[Any, Any]:
    """Model and tokenizer of an exported folder (or a hub id), in the type that the weights are stored in.

    `tokenizer` is another folder or hub id that has it. Raises ValueError where there is no model, no tokenizer, or no chat
    template to apply.
    """
    loaded = []
    for source, kind in ((tokenizer or model, AutoTokenizer), (model, AutoModelForCausalLM)):
        options = {} if kind is AutoTokenizer else {"dtype": "auto"}
        try:  # a folder is all there is: the hub is not asked for what it lacks
            loaded.append(kind.from_pretrained(str(source), local_files_only=source.is_dir(), **options))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{source}: {kind.__name__} cannot load it ({str(error).splitlines()[0]}); expected a Hugging Face folder "
                "(one that training has exported) or a hub id within reach"
            ) from error
    if apply_chat_template and not loaded[0].chat_template:
        raise ValueError(
            f"{tokenizer or model}: the tokenizer has no chat template; choose one that has (model.tokenizer_name_or_path), "
            "or set evals.apply_chat_template to false"
        )
    return loaded[1].to(device).eval(), loaded[0]


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

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int, bar: tqdm | None = None) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, softmax_dtype="float32"
        )
        self.templated: dict[str, str] = {}  # rendered conversation -> what stands before its continuation
        self.truncated = 0  # requests that lost their beginning
        self.adds_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        self.delimiter = reply_delimiter(self.render) if tokenizer.chat_template else ""
        self.bar = bar
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
        self._expect(len(requests))
        scores = super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        if not all(math.isfinite(score) for score, _ in scores):  # argmax would quietly answer with the first choice
            raise ValueError(
                f"{self.model.name_or_path}: log-probabilities are not finite, its training diverged; lower the learning rate"
            )
        return scores

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Greedy replies, each up to its end-of-sequence token, a stop string or the most new tokens allowed."""
        self._expect(len(requests))
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        limits = [Stop.of(request.args[1]) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (limits[i], -len(prompts[i]), prompts[i]))
        replies: dict[int, str] = {}
        while order:
            stop = limits[order[0]]
            batch = [i for i in order[: self.batch_size] if limits[i] == stop]
            order = order[len(batch) :]
            for i, reply in zip(batch, self._reply([prompts[i] for i in batch], stop), strict=True):
                replies[i] = reply
                self.cache_hook.add_partial("generate_until", requests[i].args, reply)
        return [replies[i] for i in range(len(requests))]

    @torch.inference_mode()
    def _reply(self, prompts: Sequence[list[int]], stop: Stop) -> list[str]:
        room = self.max_length - stop.new_tokens
        if room < 1:
            raise ValueError(
                f"evals.max_new_tokens: {stop.new_tokens} new tokens, but the model reads {self.max_length}; expected fewer"
            )
        self.truncated += sum(len(prompt) > room for prompt in prompts)
        prompts = [prompt[-room:] for prompt in prompts]
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device)
        strings = stop_sequences_criteria(self.tokenizer, list(stop.strings), width, len(prompts)) if stop.strings else None
        found = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=stop.new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=self._ends() or None,
            stopping_criteria=strings,
        )
        texts = self.tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)
        return [postprocess_generated_text(text, list(stop.strings), None) for text in texts]

    def _ends(self) -> list[int]:
        """The tokens that end a reply: the tokenizer's, and those of the model's own generation configuration."""
        own = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        return sorted(ends)

    def _expect(self, requests: int) -> None:
        if self.bar is not None:
            self.bar.total = (self.bar.total or 0) + requests
            self.bar.refresh()


class Stop(NamedTuple):
    """When a reply ends."""

    new_tokens: int
    strings: tuple[str, ...]

    @classmethod
    def of(cls, options: dict[str, Any]) -> Stop:
        """From a task's `generation_kwargs`. Raises ValueError for a task that samples: replies here are greedy."""
        if options.get("do_sample") or options.get("temperature"):
            raise ValueError(f"a task wants sampled replies ({options}); expected a greedy one: leave the task out")
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
