"""Losses that TRL has too: value and gradient of its own trainers' code, on the same logits (where TRL is installed)."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from ogdopt.losses import LOSSES, Completion, Pairs, kto_unpaired

trl = pytest.importorskip("trl", reason="TRL is not installed; the losses are not compared with it")
V, T = 7, 6
ALONE = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x)


class Given(torch.nn.Module):
    """Stands for a causal language model: its logits are given, whatever the tokens."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids=None, labels=None, **_):
        logps = self.logits.log_softmax(-1)[:, :-1]
        if labels is None:
            return SimpleNamespace(logits=self.logits)
        kept = labels[:, 1:] != -100
        chosen = logps.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        none = torch.zeros_like(chosen)
        return SimpleNamespace(log_probs=torch.where(kept, chosen, 0.0), entropy=none, mean_logits=none, is_top1=none.bool())


def case(B, seed=0):
    """Logits of B chosen and B rejected texts, their tokens and which of them are scored; a prompt is one token."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2 * B, T, V, dtype=torch.float64, generator=g)
    ids = torch.randint(V, (2 * B, T), generator=g)
    mask = (torch.arange(T) > 0) & (torch.arange(T) <= torch.randint(1, T, (2 * B, 1), generator=g))
    reference = 2 * torch.randn(2 * B, T, V, dtype=torch.float64, generator=g)
    return logits.requires_grad_(), ids, mask, reference


def completions(logits, ids, mask):
    logps = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return Completion(logps, mask[:, 1:])


def ours(name, logits, ids, mask, reference, **options):
    B = len(ids) // 2
    both = completions(logits, ids, mask)
    pairs = Pairs(Completion(both.logps[:B], both.mask[:B]), Completion(both.logps[B:], both.mask[B:]))
    if LOSSES[name].reference:
        ref = completions(reference, ids, mask).logp
        pairs = pairs._replace(ref_chosen=ref[:B], ref_rejected=ref[B:])
    return LOSSES[name](pairs, **options).mean()


def trainer(kind, **attributes):
    """A trainer without its set-up: what its loss reads is set by hand."""
    made = object.__new__(kind)
    common = dict(accelerator=ALONE, aux_loss_enabled=False, is_encoder_decoder=False, pad_token_id=0, padding_value=0)
    vars(made).update(common | attributes)
    return made


def dpo_trainer(logits, ids, mask, reference, *, beta=0.1, loss_types=("sigmoid",), loss_weights=(1.0,), label_smoothing=0.0):
    made = trainer(
        trl.DPOTrainer,
        beta=beta,
        loss_types=list(loss_types),
        loss_weights=list(loss_weights),
        label_smoothing=label_smoothing,
        model=Given(logits),
        ref_model=Given(reference),
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    made.model.is_gradient_checkpointing = False
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask.long()}
    return made._compute_loss(made.model, inputs, return_outputs=False)


def pair_trainer(kind, logits, ids, mask, **attributes):
    """TRL's CPO and ORPO trainers, which need no reference."""
    B = len(ids) // 2
    made = trainer(kind, **(dict(label_smoothing=0.0, alpha=0.0) | attributes))
    labels, seen = ids.masked_fill(~mask, -100), mask | (torch.arange(T) == 0)
    batch = {}
    for side, rows in (("chosen", slice(0, B)), ("rejected", slice(B, None))):
        batch |= {f"{side}_input_ids": ids[rows], f"{side}_labels": labels[rows], f"{side}_attention_mask": seen[rows].long()}
    return made.get_batch_loss_metrics(Given(logits), batch)[0]


def cpo_trainer(logits, ids, mask, reference, **attributes):
    from trl.experimental.cpo import CPOTrainer

    return pair_trainer(CPOTrainer, logits, ids, mask, **(dict(beta=0.1, loss_type="sigmoid", cpo_alpha=0.0) | attributes))


def orpo_trainer(logits, ids, mask, reference, **attributes):
    from trl.experimental.orpo import ORPOTrainer

    return pair_trainer(ORPOTrainer, logits, ids, mask, **attributes)


def summed_ipo(logits, ids, mask, reference, beta):
    """TRL's formula on the margin itself: its trainers average over the tokens before they come to it."""
    from trl.experimental.cpo import CPOTrainer

    B, made = len(ids) // 2, trainer(CPOTrainer, beta=beta, loss_type="ipo", alpha=0.0)
    ratios = completions(logits, ids, mask).logp - completions(reference, ids, mask).logp
    return made.cpo_loss(ratios[:B], ratios[B:])[0].mean()


# Name, our options, TRL's code, its options, pairs (1 where TRL averages a term over the tokens of the batch).
SAME = [
    ("dpo", dict(beta=0.3), dpo_trainer, dict(beta=0.3), 5),
    ("robust_dpo", dict(beta=0.3, label_smoothing=0.2), dpo_trainer,
     dict(beta=0.3, loss_types=["robust"], label_smoothing=0.2), 5),
    ("ipo", dict(beta=0.3, average_log_prob=True), dpo_trainer, dict(beta=0.3, loss_types=["ipo"]), 5),
    ("ipo", dict(beta=0.3), summed_ipo, dict(beta=0.3), 5),
    ("sppo", dict(beta=0.3), dpo_trainer, dict(beta=0.3, loss_types=["sppo_hard"]), 5),
    ("sft_dpo", dict(beta=0.3, gamma=0.7, nll_reduction="mean"), dpo_trainer,
     dict(beta=0.3, loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.7]), 1),
    ("cpo", dict(beta=0.3, cpo_alpha=0.0), cpo_trainer, dict(beta=0.3), 5),
    ("cpo", dict(beta=0.3, cpo_alpha=0.7, nll_reduction="mean"), cpo_trainer, dict(beta=0.3, cpo_alpha=0.7), 1),
    ("simpo", dict(beta=2.0, simpo_gamma=0.5), cpo_trainer, dict(beta=2.0, loss_type="simpo", simpo_gamma=0.5), 5),
    ("slic_hf", dict(delta=1.0, nll_weight=0.7, nll_reduction="mean"), cpo_trainer,
     dict(beta=1.0, loss_type="hinge", cpo_alpha=0.7), 1),
    ("orpo", dict(beta=0.3), orpo_trainer, dict(beta=0.3), 1),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "options", "theirs", "their_options", "B"), SAME)
def test_values_and_gradients_are_trl_s(name, options, theirs, their_options, B, seed):
    logits, *rest = case(B, seed)
    mine, other = ours(name, logits, *rest, **options), theirs(logits, *rest, **their_options)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (mine, other)]
    assert grads[0].abs().max() > 1e-3
    torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


def test_conservative_dpo_is_trl_s_smoothed_loss_of_log_ratios():
    """TRL's DPO trainer has it no longer; its CPO trainer's formula on log-ratios is the same."""
    from trl.experimental.cpo import CPOTrainer

    logits, ids, mask, reference = case(5)
    ratios = completions(logits, ids, mask).logp - completions(reference, ids, mask).logp
    made = trainer(CPOTrainer, beta=0.3, loss_type="sigmoid", alpha=0.0, label_smoothing=0.2)
    other = made.cpo_loss(ratios[:5], ratios[5:])[0].mean()
    mine = ours("cdpo", logits, ids, mask, reference, beta=0.3, label_smoothing=0.2)
    torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (mine, other)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_kto_and_its_divergence_are_trl_s(seed):
    """The divergence from completions under other prompts, given as z_ref; unpaired rows, and the same rows as pairs."""
    logits, ids, mask, reference = case(4, seed)
    kl_ids = ids.roll(1, 0)
    desirable = torch.arange(8) < 4
    made = trainer(
        trl.KTOTrainer,
        beta=0.3,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        precompute_ref_logps=False,
        model=Given(logits),
        ref_model=Given(reference),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    made.model.is_gradient_checkpointing = False
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask.long(), "label": desirable}
    batch |= {"KL_input_ids": kl_ids, "KL_attention_mask": torch.ones_like(ids), "KL_completion_mask": mask.long()}
    other = made._compute_loss(made.model, batch, return_outputs=False)
    z_ref = (completions(logits, kl_ids, mask).logp - completions(reference, kl_ids, mask).logp).mean().clamp(min=0)
    options = dict(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5, z_ref=z_ref)
    ref = completions(reference, ids, mask).logp
    alone = kto_unpaired(completions(logits, ids, mask), ref, desirable, **options).mean()
    paired = ours("kto", logits, ids, mask, reference, **options) / 2  # a mean over pairs, not over completions
    for mine in (alone, paired):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
        grads = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (mine, other)]
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)
