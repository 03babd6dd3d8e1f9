"""A model and the rows of a job: scoring them without gradients, the reference, what is measured on the way."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, PreTrainedModel

from ogdopt.losses import Completion, Pairs, dpo
from ogdopt_harness.common import keys
from ogdopt_harness.common.files import SEAL, DamagedError
from ogdopt_harness.common.keys import measured
from ogdopt_harness.common.ranks import ALONE, Ranks
from ogdopt_harness.common.run_folder import RunFolder
from ogdopt_harness.data.batches import Micro, deal, slots
from ogdopt_harness.data.examples import Example, Preferences, collate, mismatched, order
from ogdopt_harness.modeling.adapters import bare
from ogdopt_harness.modeling.passes import quiet
from ogdopt_harness.modeling.score import completion_logps
from ogdopt_harness.training.job import Job
from ogdopt_harness.training.methods import METHODS, Method
from ogdopt_harness.training.sparse import SparseTerm
from ogdopt_harness.training.step_record import StepRecord

EVAL_BETA = 0.1
"""Beta of the rewards and of the DPO loss that are measured on held-out pairs (paper, Figure 6)."""


class Scorer:
    """A model and the rows of a job: log-probabilities of answers, with gradients and without, and what they say."""

    kind: Any = AutoModelForCausalLM
    """What loads its exported folders."""

    def __init__(
        self,
        job: Job,
        model: PreTrainedModel,
        tokenizer: Any,
        device: torch.device,
        bf16: bool,
        reference: Callable[[], PreTrainedModel] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.job, self.model, self.tokenizer, self.device = job, model, tokenizer, device
        self.reference_model = reference
        self.ranks = ranks
        self.method: Method = METHODS[job.method]
        cast = bf16 and device.type != "cpu" and not isinstance(bare(model), FSDPModule)  # which casts by itself
        self.autocast = torch.autocast(device.type, torch.bfloat16) if cast else nullcontext()
        self.mismatched = mismatched(job.data) if self.method.loss == "kto" else []
        self.sparse: SparseTerm | None = None
        if self.method.loss == "sparse":
            size = bare(model).config.hidden_size
            self.sparse = SparseTerm(job.preference.sparse, job.data, size, job.config.train_on_prompt, device, ranks)
        self.reference: dict[str, Tensor] = {}

    def micro_batches(self, examples: Sequence[Example], record: StepRecord | None = None, answers: int = 1) -> list[Micro]:
        """This process's micro-batches of a batch; a row goes through the model with `answers` sequences of its length."""
        config = self.job.config
        lengths = [len(e.prompt_ids) + len(e.completion_ids) for e in examples]
        most, budget = config.per_device_train_batch_size, config.per_device_train_tokens
        if record is None:  # without gradients: as many tokens as a training pass may have, in any number of sequences
            most, budget = max(64, most), budget or most * config.data.max_length
        micros = deal(lengths, most, budget and budget // answers, self.ranks.rank, self.ranks.size)
        if record is not None:
            record.tokens += answers * sum(lengths[i] for micro in micros if micro.counts for i in micro.rows)
            record.slots += answers * sum(slots(lengths, micro) for micro in micros)
        return micros

    def score(
        self, examples: Sequence[Example], on_prompt: bool | None = None, states: list[Tensor] | None = None
    ) -> Completion:
        """The scored tokens of these examples in one pass, (B, T - 1) each; `states` gets the hidden states before them."""
        on_prompt = self.job.config.train_on_prompt if on_prompt is None else on_prompt
        batch = collate(examples, self.tokenizer.pad_token_id, on_prompt)
        ids, attention = (x.to(self.device, non_blocking=True) for x in (batch.input_ids, batch.attention_mask))
        with self.autocast:  # the loss mask stays: no question to the device
            return completion_logps(self.model, ids, attention, batch.loss_mask, states)

    def references(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Reference log-probabilities of the chosen and of the rejected answers of these pairs, (N,) each."""
        A, B = (self.reference[f"train_{side}"][indices].to(self.device) for side in ("chosen", "rejected"))
        return A, B

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Passes without gradients, and without the dropout that adapters may have."""
        model = self.model
        model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            quiet(model)
            self.reshard()

    def reshard(self) -> None:
        """After passes without gradients: what lies outside of the layers stays gathered until a backward pass comes."""
        if isinstance(plain := bare(self.model), FSDPModule):
            plain.reshard()

    def scores(self, examples: Sequence[Example], on_prompt: bool = False) -> list[Completion]:
        """The scored tokens of each example, (1, T - 1), on the CPU, without gradients, in every process."""
        found: dict[int, Completion] = {}
        with self.looking():
            for micro in self.micro_batches(examples):
                scored = Completion(*(x.cpu() for x in self.score([examples[i] for i in micro.rows], on_prompt)))
                if micro.counts:
                    rows = zip(micro.rows, scored.logps, scored.mask, strict=True)
                    found |= {i: Completion(logps[None], mask[None]) for i, logps, mask in rows}
        together = {i: completion for part in self.ranks.gather(found) for i, completion in part.items()}
        return [together[i] for i in range(len(examples))]

    def logps(self, examples: Sequence[Example], on_prompt: bool = False) -> tuple[Tensor, Tensor]:
        """(sums over scored tokens, numbers of these) of the examples, each (N,), on the CPU, without gradients."""
        found = torch.zeros(2, len(examples), device=self.device)
        with self.looking():
            for micro in self.micro_batches(examples):
                completion = self.score([examples[i] for i in micro.rows], on_prompt)
                if micro.counts:
                    found[:, micro.rows] = torch.stack([completion.logp, completion.length.to(completion.logp.dtype)])
        sums, lengths = self.ranks.sum(found).cpu()
        return sums, lengths

    def load_reference(self) -> None:
        """Know the log-probabilities of the starting model, which are computed once and kept with the run."""
        file = RunFolder(self.job.directory).reference
        kept = self.ranks.on_first(lambda: _kept(file))
        if kept is None:
            with self._as_reference():
                kept = found = self._reference_logps()

            def keep() -> None:
                temporary = file.with_suffix(".tmp")
                save_file(found, temporary, metadata={SEAL: _seal(found)})
                os.replace(temporary, file)

            if found:
                self.ranks.on_first(keep)
        self.reference = kept
        if self.sparse is not None:
            self.sparse.reference = kept["train_tokens"]

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """Score with the reference model, if that is another one than the model to be trained."""
        if self.reference_model is None:
            yield
            return
        trained = self.model
        self.model = self.reference_model()
        try:
            yield
        finally:
            self.model = trained

    def _reference_logps(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if self.method.reference:
            found["train_chosen"] = self.logps(self.job.data.winners)[0]
            found["train_rejected"] = self.logps(self.job.data.losers)[0]
        if self.method.loss == "kto":
            found["train_mismatched"] = self.logps(self.mismatched)[0]
        if self.sparse is not None:
            scored = self.scores([*self.job.data.winners, *self.job.data.losers], self.job.config.train_on_prompt)
            found["train_tokens"] = torch.cat([completion.logps[completion.mask.bool()] for completion in scored])
        if self.job.held_out is not None:
            found["eval_chosen"] = self.logps(self.job.held_out.winners)[0]
            found["eval_rejected"] = self.logps(self.job.held_out.losers)[0]
        return found

    def measure(self) -> dict[str, float]:
        """TRL's names with the prefix eval_: log-probabilities of held-out answers, and rewards against step 0."""
        line: dict[str, float] = {}
        if self.job.validation:
            total, tokens = self.logps(self.job.validation)
            line[keys.EVAL_LOSS] = -(total.sum() / tokens.sum()).item()
        line |= self._objectives()
        held_out = self.job.held_out
        if held_out is None:
            return line
        scores = [self.scores(side) for side in (held_out.winners, held_out.losers)]
        (a, n_w), (b, n_l) = map(sums_of, scores)
        line |= {measured(keys.logps(side)): x.mean().item() for side, x in zip(keys.SIDES, (a, b))}
        line |= {measured(keys.logps_mean(side)): x.mean().item() for side, x in zip(keys.SIDES, (a / n_w, b / n_l))}
        A, B = self.reference["eval_chosen"], self.reference["eval_rejected"]
        if held_out.paired:
            line |= {measured(name): v.item() for name, v in rewards_of(a - A, b - B, EVAL_BETA).items()}
            line[keys.EVAL_DPO_LOSS] = dpo_of(a, b, A, B, EVAL_BETA).mean().item()
            if (mass := unseen_mass(held_out, *scores)) is not None:
                line[keys.UNSEEN] = mass
        return line

    def _objectives(self) -> dict[str, float]:
        """Both objectives of a joint run, on the same rows of either stream's training data at every measurement."""
        joint = self.job.joint
        if joint is None:
            return {}
        data, config = self.job.data, self.job.config
        some = order(len(data.winners), 0, 0)[: joint.objective_rows]
        a, b = (self.logps([side[i] for i in some])[0] for side in (data.winners, data.losers))
        A, B = (self.reference[f"train_{side}"][some] for side in ("chosen", "rejected"))
        rows = [joint.supervised[i] for i in order(len(joint.supervised), 0, 0)[: joint.objective_rows]]
        total, tokens = self.logps(rows, on_prompt=config.train_on_prompt)
        losses = -total if config.loss_reduction == "sum" else -total / tokens
        f_dpo = dpo_of(a, b, A, B, self.job.beta or EVAL_BETA).mean()
        return {measured(keys.objective(name)): x.item() for name, x in zip(keys.STREAMS, (f_dpo, losses.mean()))}


def sums_of(scores: Sequence[Completion]) -> tuple[Tensor, Tensor]:
    """(sums over scored tokens, numbers of these), each (N,), of the micro-batches of N examples."""
    return torch.cat([c.logp for c in scores]), torch.cat([c.length for c in scores])


def unseen_mass(pairs: Preferences, winners: Sequence[Completion], losers: Sequence[Completion]) -> float | None:
    """The probability of answers unlike both of a pair: what neither has where the two first differ, mean over the pairs.

    Up to there they are one text, so `1 - pi(the one's next token | it) - pi(the other's | it)` needs no further pass. None if
    no two answers differ before one of them was cut.
    """
    rows = ([row for c in side for row in c.logps] for side in (winners, losers))
    found = []
    for chosen, rejected, w, l in zip(pairs.winners, pairs.losers, *rows):
        place = _fork(chosen, rejected)
        if place is not None:
            found.append(1 - w[place - 1].exp() - l[place - 1].exp())  # column t belongs to token t + 1
    return torch.stack(found).mean().clamp(min=0).item() if found else None


def _fork(chosen: Example, rejected: Example) -> int | None:
    """The first place at which two answers to one prompt have different tokens; None if there is none."""
    one, other = (x.prompt_ids + x.completion_ids for x in (chosen, rejected))
    place = next((k for k, (x, y) in enumerate(zip(one, other)) if x != y), None)
    # A token may reach from the prompt into one answer alone; then it counts as the prompt's, and has no score.
    return None if place is None or place < max(len(chosen.prompt_ids), len(rejected.prompt_ids)) else place


def dpo_of(a: Tensor, b: Tensor, A: Tensor, B: Tensor, beta: float) -> Tensor:
    """The DPO loss of pairs, (N,), from log-probabilities of their answers, (N,) each; A and B are the reference's."""
    return dpo(pairs_of(a, b, A, B), beta=beta)


def pairs_of(a: Tensor, b: Tensor, A: Tensor, B: Tensor) -> Pairs:
    """Pairs of which the answers' log-probabilities, (N,) each, are all that is known."""
    one = torch.ones(len(a), 1, device=a.device)
    return Pairs(Completion(a[:, None], one), Completion(b[:, None], one), A, B)


def rewards_of(chosen: Tensor, rejected: Tensor, beta: float) -> dict[str, Tensor]:
    """TRL's reward metrics from log-ratios (a - A, b - B), each (B,): batch means of shape ()."""
    return {
        keys.reward(keys.CHOSEN): beta * chosen.mean(),
        keys.reward(keys.REJECTED): beta * rejected.mean(),
        keys.MARGINS: beta * (chosen - rejected).mean(),
        keys.ACCURACIES: (chosen > rejected).float().mean(),
    }


def _kept(file: Path) -> dict[str, Tensor] | None:
    """The log-probabilities that a file holds; None, with a warning, where they are not what was written."""
    if not file.exists():
        return None
    try:
        found = load_file(file)
        with safe_open(file, "pt") as opened:
            seal = (opened.metadata() or {}).get(SEAL)
    except Exception as error:  # safetensors' own kind, and the system's
        seal, found, said = None, {}, (str(error).splitlines() or [type(error).__name__])[0]
    else:
        said = "its sha256 differs"
    if seal is not None and seal == _seal(found):
        return found
    warnings.warn(f"{file} is not what was written ({said}); its log-probabilities are computed again", stacklevel=2)
    if file.is_dir():
        raise DamagedError(f"{file} is a folder; expected the file that a run writes there: remove it")
    return None


def _seal(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and values."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        found.update(value.view(torch.uint8).numpy().tobytes() if value.ndim else repr(value.item()).encode())
    return found.hexdigest()
