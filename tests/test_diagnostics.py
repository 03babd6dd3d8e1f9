"""Entanglement: Condition 1 and 2 are the signs of the first-order changes, and the fourth case cannot happen."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ogdopt import PairedGradient, ProjectedGradient
from ogdopt.diagnostics import by_layer, cosines, entanglement, predicted, probe, token_products, weights
from ogdopt.gram import Gram, gram
from ogdopt.losses import LOSSES, Completion, Pairs
from ogdopt.projection import watch
from tests.gradients import inner, norm, pairs
from tests.test_theorems import TwoLayerLM

ANY = pairs(kinds=("random", "nearly parallel", "conflicting"), dtypes=(torch.float64,), scales=(-3, 3))
CASES = {(1.0, 1.0): 1.0, (0.0, 1.0): 2.0, (1.0, 0.0): 3.0, (0.0, 0.0): 4.0}


@given(ANY, st.floats(-2, 20), st.floats(-2, 20))
def test_conditions_are_the_signs_of_the_predicted_changes(case, d_w, d_l):
    """Delta a = eta (d_w ww - d_l wl) and Delta b = eta (d_w wl - d_l ll) (SPEC 4.3); case 4 needs a weight below 0."""
    ws, ls, _, _ = case
    report = entanglement(gram(ws, ls), d_w, d_l)
    ww, wl, ll = inner(ws, ws), inner(ws, ls), inner(ls, ls)
    da, db = predicted(gram(ws, ls), d_w, d_l)
    slack = 1e-12 * (abs(d_w) + abs(d_l)) * (ww + ll)
    assert (da, db) == pytest.approx((d_w * ww - d_l * wl, d_w * wl - d_l * ll), abs=slack)
    if abs(da) > slack:
        assert report["entanglement/condition_chosen"] == float(da >= 0)
    if abs(db) > slack:
        assert report["entanglement/condition_rejected"] == float(db <= 0)
    found = (report["entanglement/condition_chosen"], report["entanglement/condition_rejected"])
    assert report["entanglement/case"] == CASES[found]
    assert found != (0.0, 0.0) or min(d_w, d_l) < 0
    assert report["entanglement/inner_product"] == pytest.approx(wl, abs=1e-9 * (ww * ll) ** 0.5)
    assert report["entanglement/norm_chosen"] == pytest.approx(norm(ws))


@pytest.mark.parametrize(("ww", "ll", "case"), [(3.0, 3.0, 1.0), (1.0, 9.0, 2.0), (9.0, 1.0, 3.0)])
def test_cases_of_table_1(ww, ll, case):
    numbers = gram([torch.tensor([ww**0.5])], [torch.tensor([ll**0.5])])._replace(wl=torch.tensor([2.0]))
    assert entanglement(numbers)["entanglement/case"] == case


def test_zero_gradients_have_cosine_zero():
    assert entanglement(gram([torch.zeros(3)], [torch.ones(3)]))["entanglement/cosine"] == 0.0


@given(ANY, st.integers(1, 40), st.integers(1, 40))
def test_simpo_s_condition_is_length_biased(case, n_w, n_l):
    """Eq. 11: with the weights 1/n_w and 1/n_l it is Condition 1 of the gradients of the mean log-probabilities."""
    ws, ls, _, _ = case
    one = torch.zeros(1, dtype=torch.float64)
    of = lambda n: Completion(one.expand(1, n) - 1, torch.ones(1, n))  # noqa: E731
    d_w, d_l = weights(LOSSES["simpo"], Pairs(of(n_w), of(n_l)))
    assert (d_w / d_l).item() == pytest.approx(n_l / n_w)
    biased = entanglement(gram(ws, ls), d_w.item(), d_l.item())
    mean = gram([g / n_w for g in ws], [g / n_l for g in ls])
    if min(abs(x) for x in predicted(mean)) > 1e-12 * (mean.ww + mean.ll).sum().item():
        assert biased["entanglement/case"] == entanglement(mean)["entanglement/case"]
    assert biased["entanglement/case"] != 4.0


def scored(logits, B=4):
    """Pairs whose tokens' log-probabilities are made of `logits`, (2 B, 5, 7); the chosen have up to 5 tokens, the others 4."""
    g = torch.Generator().manual_seed(1)
    logps = logits.log_softmax(-1)[..., 0]
    masks = [torch.arange(5) < torch.randint(1, n, (B, 1), generator=g) for n in (6, 5)]
    reference = [logps.detach()[i * B : (i + 1) * B].sum(-1) + torch.randn(B, generator=g) for i in range(2)]
    return Pairs(Completion(logps[:B], masks[0]), Completion(logps[B:], masks[1]), *reference)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_a_loss_is_made_of_its_weights(name):
    """dL/dtheta = -(d_w G_w - d_l G_l), summed over the pairs."""
    theta = torch.randn(8, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    made = scored(theta)
    d_w, d_l = weights(LOSSES[name], made)
    assert d_w.shape == d_l.shape == (4,) and not d_w.requires_grad and theta.grad is None
    moves = (d_w * made.chosen.logp - d_l * made.rejected.logp).sum()
    (expected,) = torch.autograd.grad(moves, theta, retain_graph=True)
    (found,) = torch.autograd.grad(LOSSES[name](made).sum(), theta)
    torch.testing.assert_close(found, -expected)


@pytest.mark.parametrize("name", ["dpo", "simpo", "cpo", "dpop", "flex_dpo"])
@pytest.mark.parametrize("seed", range(4))
def test_entanglement_of_a_loss_at_hand_predicts_where_its_step_leads(name, seed):
    """Shared logits: a small step of descent on one pair's loss raises or lowers a and b as the conditions say."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.rand(2, 5, 7, 7, dtype=torch.float64, generator=g) / 2 + torch.eye(7)
    theta = torch.randn(7, dtype=torch.float64, generator=g).requires_grad_()
    made = lambda x: scored(mix @ x, B=1)  # noqa: E731
    before = made(theta)
    ws, ls = (torch.autograd.grad(c.logp.sum(), theta, retain_graph=True) for c in before[:2])
    d_w, d_l = weights(LOSSES[name], before)
    found = entanglement(gram(list(ws), list(ls)), d_w.item(), d_l.item())
    (slope,) = torch.autograd.grad(LOSSES[name](before).sum(), theta)
    after = made(theta.detach() - 1e-6 * slope / slope.norm())
    assert found["entanglement/condition_chosen"] == float((after.chosen.logp > before.chosen.logp).item())
    assert found["entanglement/condition_rejected"] == float((after.rejected.logp < before.rejected.logp).item())


@torch.no_grad()
def test_weights_ignore_masked_tokens_and_need_no_graph():
    logps = torch.tensor([[-1.0, -2.0, float("-inf")], [-3.0, -3.0, -3.0]])
    made = Completion(logps, torch.tensor([[1, 1, 0], [0, 0, 0]]))
    d_w, d_l = weights(LOSSES["simpo"], Pairs(made, made), beta=2.0, simpo_gamma=0.0)
    assert d_w.tolist() == d_l.tolist() == [0.5, 0.0]


def test_weights_need_one_number_a_pair():
    made = Completion(-torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"the loss has shape \(\); expected one number a pair, \(3,\)"):
        weights(lambda pairs: LOSSES["cpo"](pairs).mean(), Pairs(made, made))


def language_model(seed=0):
    torch.manual_seed(seed)
    return TwoLayerLM(), torch.randint(7, (2, 3, 5))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.AdamW])
@pytest.mark.parametrize("loss", ["dpo", "simpo", "sft_dpo"])
def test_a_probe_sees_what_any_optimizer_does(base, loss):
    """To first order the changes are <G, delta> of the step that was taken, whatever the optimizer made of the gradient."""
    model, tokens = language_model()
    sides = [lambda x=x: model(x).logp.mean() for x in tokens]
    optimizer = base(model.parameters(), lr=1e-6)
    made = Pairs(*(model(x) for x in tokens))
    reference = [c.logp.detach() + 0.1 for c in made[:2]]
    made = made._replace(ref_chosen=reference[0], ref_rejected=reference[1])
    LOSSES[loss](made).mean().backward()
    held = [p.grad.clone() for p in model.parameters()]
    ws, ls = ([torch.autograd.grad(f(), p)[0] for p in model.parameters()] for f in sides)
    values = [f().item() for f in sides]
    with probe(model.parameters(), *sides) as seen:
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), held))
        optimizer.step()
    torch.testing.assert_close(torch.stack(seen.gram[:3]), torch.stack(gram(ws, ls)[:3]))
    assert seen.realised == pytest.approx([f().item() - v for f, v in zip(sides, values)], abs=1e-15)
    assert seen.predicted == pytest.approx(seen.realised, rel=2e-3) and min(map(abs, seen.realised)) > 1e-9
    if base is torch.optim.SGD and loss == "dpo":  # one weight a pair, and here nearly the same for all pairs
        d_w, d_l = (d.mean().item() for d in weights(LOSSES[loss], made))
        assert seen.predicted == pytest.approx([1e-6 * x for x in predicted(seen.gram, d_w, d_l)], rel=0.05)
    assert set(seen.metrics) == {f"entanglement/{k}_{s}" for k in ("predicted", "realised") for s in ("chosen", "rejected")}


def test_a_probe_adds_up_micro_batches():
    model, tokens = language_model()
    whole = [lambda x=x: model(x).logp.mean() for x in tokens]
    parts = [lambda x=x: (model(row[None]).logp.sum() / len(x) for row in x) for x in tokens]
    with probe(model.parameters(), *whole) as one, probe(model.parameters(), *parts) as two, torch.no_grad():
        for p in model.parameters():
            p.add_(1e-3)
    torch.testing.assert_close(torch.stack(one.gram[:3]), torch.stack(two.gram[:3]))
    assert one.predicted == pytest.approx(two.predicted) and one.realised == pytest.approx(two.realised)


def test_a_probe_leaves_no_trace_in_training():
    """The same steps with and without, bit for bit; frozen parameters are left out."""

    def trained(watching):
        model, tokens = language_model()
        model.embed.weight.requires_grad_(False)
        opt = ProjectedGradient(torch.optim.RMSprop([p for p in model.parameters() if p.requires_grad], lr=1e-3))
        values = [lambda x=x: model(x).logp.mean() for x in tokens]
        for _ in range(3):
            with probe(model.parameters(), *values) if watching else nullcontext() as seen:
                opt.step(*(lambda f=f: -f() for f in values))
            assert not watching or len(seen.gram.ww) == 4
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(trained(True), trained(False))


@pytest.mark.parametrize("seed", range(5))
def test_token_gradients_add_up_to_the_answers(seed):
    """Sum of token gradients = gradient of the answer (SPEC 4.9), so sums of blocks are its Gram numbers."""
    model, tokens = language_model(seed)
    chosen, rejected = (model(x[:1]).logps[0] for x in tokens)
    found = token_products(torch.cat([chosen, rejected]), model.parameters())
    ws, ls = (torch.autograd.grad(x.sum(), list(model.parameters()), retain_graph=True) for x in (chosen, rejected))
    n = len(chosen)
    sums = [found[:n, :n].sum(), found[:n, n:].sum(), found[n:, n:].sum()]
    torch.testing.assert_close(torch.stack(sums), torch.stack([x.sum() for x in gram(ws, ls)[:3]]))
    one, other = (torch.autograd.grad(x[2], list(model.parameters()), retain_graph=True) for x in (chosen, rejected))
    assert found[2, n + 2].item() == pytest.approx(inner(one, other))
    angles = cosines(found)
    torch.testing.assert_close(angles.diagonal(), torch.ones(2 * n, dtype=torch.float64))
    assert torch.equal(found, found.T) and angles.abs().max() <= 1


def test_a_token_without_gradient_has_cosine_zero():
    assert cosines(torch.tensor([[4.0, 0.0], [0.0, 0.0]])).tolist() == [[1.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_layers_from_the_numbers_of_each_tensor(scope):
    """At no cost, in every scope; the sums over all layers are the whole model's numbers."""
    model, tokens = language_model()
    opt = PairedGradient(torch.optim.SGD(model.parameters(), lr=0.0), watch, scope=scope)
    report = opt.step(*(lambda x=x: -model(x).logp.mean() for x in tokens))
    assert [x.sum().item() for x in report.tensors[:3]] == pytest.approx(list(report.gram))
    found = by_layer(report, model)
    assert list(found) == ["embed", "hidden", "head"]
    ws, ls = ([torch.autograd.grad(model(x).logp.mean(), p)[0] for p in model.hidden.parameters()] for x in tokens)
    assert found["hidden"] == pytest.approx(gram(ws, ls).pooled([2]).cosine.item())


def four_layers():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(6, 6) for _ in range(4)])
    x, y = torch.randn(9, 6), torch.randn(9, 6)
    return model, lambda: model(x).square().mean(), lambda: (model(y) - 1).square().mean()


def cosine_of_each_layer(model, winner, loser):
    """By autograd, layer by layer."""
    found = {}
    for k, layer in enumerate(model):
        ps = [p for p in layer.parameters() if p.requires_grad]
        if ps:
            ws, ls = (torch.autograd.grad(loss(), ps) for loss in (winner, loser))
            found[str(k)] = inner(ws, ls) / (norm(ws) * norm(ls))
    return found


@pytest.mark.parametrize("frozen", [(), (0, 1), (1,), (3,)])
def test_layers_of_a_model_with_frozen_parameters(frozen):
    """As every user of adapters has it: the probe is given all parameters, and looks at those that are trained."""
    model, winner, loser = four_layers()
    for k in frozen:
        model[k].requires_grad_(False)
    with probe(model.parameters(), winner, loser) as seen:
        pass
    expected = pytest.approx(cosine_of_each_layer(model, winner, loser), rel=1e-5)
    for model_or_pairs in (model, model.named_parameters(), dict(model.named_parameters()).items()):
        assert by_layer(seen, model_or_pairs) == expected
    assert by_layer(seen.gram, model) == expected


def test_layers_where_the_optimizer_has_groups_of_its_own():
    """Decay for matrices and none for biases, the usual order: not the model's."""
    model, winner, loser = four_layers()
    groups = [{"params": [p for p in model.parameters() if p.ndim == n], "weight_decay": 0.1 * (n == 2)} for n in (2, 1)]
    report = PairedGradient(torch.optim.SGD(groups, lr=0.0), watch).step(winner, loser)
    assert by_layer(report, model) == pytest.approx(cosine_of_each_layer(model, winner, loser), rel=1e-5)
    assert by_layer(report.tensors, torch.nn.ModuleDict({"inner": model})) == by_layer(report, model)


def test_names_of_another_origin_are_refused():
    model, winner, loser = four_layers()
    names = [name for name, _ in model.named_parameters()]
    with probe(model.parameters(), winner, loser) as seen:
        pass
    with pytest.raises(TypeError, match=r"by_layer\(\) got 8 names.*pass the model, or model\.named_parameters"):
        by_layer(seen, names)
    with pytest.raises(ValueError, match=r"8 of 8 parameters that the model does not have \(shapes \(6, 6\), \(6,\)"):
        by_layer(seen, four_layers()[0])
    x = torch.ones(3)
    with pytest.raises(ValueError, match="got 8 names for 3 Gram numbers; expected one name an entry"):
        by_layer(Gram(x, x, x), names)
    assert seen.gram.pooled([8]).parameters is None


def test_names_of_layers():
    x = torch.ones(5)
    names = ["base_model.model.model.layers.10.self_attn.q_proj.lora_A.default.weight", "model.layers.10.mlp.up_proj.weight"]
    names += ["transformer.h.2.ln_1.bias", "transformer.wte.weight", "theta"]
    assert list(by_layer(Gram(x, x, x), names)) == ["10", "2", "wte", "theta"]
