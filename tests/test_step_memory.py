"""What an optimizer step of the harness needs beside parameters, gradients and state: a few tensors, not a model."""

import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ogdopt_harness.data.examples import collate
from ogdopt_harness.modeling.build import build_model
from ogdopt_harness.modeling.score import completion_logps
from ogdopt_harness.training.trainer import Trainer
from tests import small
from tests.test_train import job


class Peak(TorchDispatchMode):
    """The most bytes at a time in storages that are made inside, by how long their tensors live."""

    def __init__(self, *before):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in before}
        self.alive, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.made(tensor)
        return out

    def made(self, tensor):
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self.known:
            return
        if place not in self.alive:
            self.alive[place] = 0
            self.now += size
            self.most = max(self.most, self.now)
        self.alive[place] += 1
        weakref.finalize(tensor, self.gone, place, size)

    def gone(self, place, size):
        self.alive[place] -= 1
        if not self.alive[place]:
            del self.alive[place]
            self.now -= size


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return small.tokenizer(tmp_path_factory.mktemp("tok"))


def peak(tok, folder, optimizer, **changes):
    """(bytes of temporaries in the second step, of the largest parameter, of the model)."""
    shape = small.ARCHITECTURE | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 12}
    model = build_model(dataclasses.replace(small.MODEL, architecture=shape), tok, 0)
    trainer = Trainer(job(folder, tok, optimizer=optimizer, **changes), model, tok, torch.device("cpu"), False)
    trainer.step(0)  # makes the state
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    base = trainer.optimizer.base
    state = [x for entry in base.state.values() for x in entry.values() if isinstance(x, torch.Tensor)]
    with Peak(*model.parameters(), *(p.grad for p in model.parameters()), *state) as mode:
        base.step()
    sizes = [p.nbytes for p in model.parameters()]
    return mode.most, max(sizes), sum(sizes)


@pytest.mark.parametrize(("optimizer", "tensors"), [("RMSprop", 2), ("Adam", 3), ("AdamW", 3), ("SGD", 0)])
def test_a_step_needs_no_more_than_a_few_tensors(optimizer, tensors, tok, tmp_path):
    most, largest, whole = peak(tok, tmp_path, optimizer)
    assert tensors * largest <= most <= tensors * largest + 1024 < whole / 4


def test_the_foreach_step_would_need_the_whole_model(tok, tmp_path):
    """So the measure above sees such a temporary; it is what torch does by default on an accelerator."""
    most, _, whole = peak(tok, tmp_path, "RMSprop", optimizer_args={"foreach": True})
    assert most >= whole


class Largest(TorchDispatchMode):
    """The largest tensor that is made inside and has so many columns, in elements."""

    def __init__(self, columns):
        super().__init__()
        self.columns, self.most = columns, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 1 and tensor.shape[-1] == self.columns:
                self.most = max(self.most, tensor.numel())
        return out


def test_no_more_logits_are_alive_than_a_chunk_of_scored_tokens_has(tok, monkeypatch):
    """Forwards and backwards, and what comes out is what one pass over all of them gives. 12 rows score 70 tokens and more."""
    shape = small.ARCHITECTURE | {"vocab_size": 997, "tie_word_embeddings": False}  # a size that nothing else has
    model = build_model(dataclasses.replace(small.MODEL, architecture=shape), tok, 0)
    batch = collate(small.preferences(tok).winners, tok.pad_token_id)
    weights = torch.rand(len(batch.input_ids), generator=torch.Generator().manual_seed(0))
    found = []
    for chunk in (16, 10_000):
        monkeypatch.setattr("ogdopt_harness.modeling.score.HEAD_CHUNK", chunk)
        with Largest(997) as seen:
            logps = completion_logps(model, *batch).logp
            grads = torch.autograd.grad((weights * logps).sum(), list(model.parameters()))
        found.append((seen.most, logps, grads))
    (small_most, a, ga), (most, b, gb) = found
    scored = int(batch.loss_mask[:, 1:].sum())
    assert scored > 70 and most == scored * 997 and small_most == 16 * 997
    torch.testing.assert_close(a, b)
    for x, y in zip(ga, gb, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
