"""The compiled forms equal the plain ones: numbers, mixture and the steps of four bases; what cannot be fused says why."""

import pytest
import torch

from ogdopt import PairedGradient, ProjectedGradient, fused, native, projection, routes
from ogdopt.gram import gram
from ogdopt.metric import Entry
from ogdopt.passes import mix_, products
from ogdopt.stored import Stored

BASES = {
    "RMSprop": (torch.optim.RMSprop, {}),
    "RMSprop, momentum and decay": (torch.optim.RMSprop, {"momentum": 0.9, "weight_decay": 0.1, "alpha": 0.9}),
    "Adam": (torch.optim.Adam, {"weight_decay": 0.1}),
    "AdamW": (torch.optim.AdamW, {"betas": (0.8, 0.95), "weight_decay": 0.1}),
    "SGD": (torch.optim.SGD, {}),
    "SGD, momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    "SGD, Nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
}
SHAPES = [(3, 1024), (64, 48), (5, 7), (2, 1024), (2048,), (4, 1024), (100,), (8, 1024), (6, 1024), (1,), (9, 1024)]
"""Full batches of the compiled form and some left over, whole blocks and not, short ones."""


def lists(seed=0, scale=1.0, dtype=torch.float32):
    torch.manual_seed(seed)
    winner = [scale * torch.randn(shape) for shape in SHAPES]
    loser = [0.5 * w + scale * torch.randn(w.shape) for w in winner]
    return [w.to(dtype) for w in winner], [l.to(dtype) for l in loser]


@pytest.fixture(params=["C++", "torch.compile"])
def loops(request, monkeypatch):
    """Which loops go over float32 gradients: our own, and those that stand in for them."""
    if request.param == "torch.compile":
        monkeypatch.setattr(native, "unfit", lambda columns, _: {*range(len(columns[0]))})
    return request.param


def coefficients(b, a=1.0):
    return [torch.full((len(SHAPES),), x, dtype=torch.float64) for x in (a, b)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-22, 1e18], ids=["usual", "squares underflow", "squares overflow"])
def test_numbers_equal_the_reference(loops, dtype, scale):
    ws, ls = lists(scale=scale, dtype=dtype)
    ws[1] = torch.randn(48, 64).mul(scale).to(dtype).T  # no flat view
    ws[3] = None
    numbers, reference = gram(ws, ls, rows=fused.rows(ws, ls)), gram(ws, ls)
    for got, expected, bound in zip(numbers, reference[:3], (reference.ww, (reference.ww * reference.ll).sqrt(), reference.ll)):
        assert ((got - expected).abs() <= 1e-7 * bound).all()
    assert numbers.ww[3] == 0 and (numbers.ll > 0).all()


def test_sums_are_as_good_as_the_angle_needs(loops):
    """At 20M elements: relative errors of 1e-9, and an angle under 1e-7 after the mixture, at a high cosine too."""
    torch.manual_seed(0)
    loser = torch.distributions.StudentT(3.0).sample((20_000_000,))
    for noise in (1.0, 0.03):
        winner = loser + noise * torch.randn(20_000_000)
        numbers, reference = gram([winner], [loser], rows=fused.rows([winner], [loser])), gram([winner], [loser])
        assert all((got / expected - 1).abs() < 5e-9 for got, expected in zip(numbers[:3], reference[:3]))
        assert fused.mix([winner], [loser], torch.ones(1, dtype=torch.float64), -numbers.wl / numbers.ll)
        assert gram([winner], [loser]).cosine.abs() < 1e-7


def test_parallel_gradients_are_seen_as_such(loops):
    ws, _ = lists()
    ls = [0.3 * w for w in ws]
    assert gram(ws, ls, rows=fused.rows(ws, ls)).pooled([len(ws)]).same_direction


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("a", "b"), [(1.0, -0.7), (0.3, -0.2), (1.0, 0.0), (0.0, 0.0), (0.0, -2.0), (0.5, -1e3)])
def test_the_mixture_equals_the_reference(loops, dtype, a, b):
    ws, ls = lists(dtype=dtype)
    ws[1] = torch.randn(48, 64).to(dtype).T
    ls[4] = None
    expected = [w.clone(memory_format=torch.preserve_format) for w in ws]
    one, other = coefficients(b, a)
    for k, (w, l) in enumerate(zip(expected, ls)):
        mix_(w, l, one[k], other[k])
    assert fused.mix(ws, ls, one, other)
    for k, (got, want) in enumerate(zip(ws, expected)):
        eps, size = torch.finfo(dtype).eps, abs(a) * 4 + abs(b) * 4
        assert torch.allclose(got.float(), want.float(), rtol=2 * eps, atol=eps * size), k
    if (a, b) == (1.0, 0.0):
        assert torch.equal(ws[0], expected[0])


def test_loops_of_our_own_take_any_length_from_any_address_on_any_number_of_threads():
    torch.manual_seed(0)
    sizes = [1, 15, 16, 17, 1023, 1024, 1025, 65535, 65536, 65537, 3 * 65536 + 5]
    buffer = torch.randn(sum(sizes) + 1)[1:]  # no tensor begins at a multiple of 64 bytes
    ws, ls = list(buffer.split(sizes)), [torch.randn(n) for n in sizes]
    reference = torch.stack([products(w, l) for w, l in zip(ws, ls)])
    table = fused._coefficients(torch.rand(len(sizes), dtype=torch.float64), -torch.rand(len(sizes), dtype=torch.float64))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            mixed = [w.clone() for w in ws]
            native.step("mix", [mixed, mixed, ls], table)
            results.append((native.products(ws, ls), *mixed))
    finally:
        torch.set_num_threads(before)
    numbers, *mixed = results[0]
    size = (reference[:, 0] * reference[:, 2]).sqrt()
    assert ((numbers - reference).abs() <= 1e-7 * torch.stack([reference[:, 0], size, reference[:, 2]], 1)).all()
    for got, w, l, c in zip(mixed, ws, ls, table):
        assert torch.allclose(got, fused.mixed(w, l, c), rtol=1e-6, atol=1e-6)
    for others in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], others))


def test_what_is_not_flat_memory_is_read_as_what_it_stands_for():
    """Views that negate or repeat what is stored are left to torch."""
    torch.manual_seed(0)
    ws = [torch.randn(2048), torch.randn(2048), torch.randn(8, 256)]
    ls = [torch._neg_view(torch.randn(2048)), torch.randn(1).expand(2048), torch.randn(256, 8).T]
    assert not any(native.fits(w, l) for w, l in zip(ws, ls)) and native.fits(ws[0], ls[0].clone())
    assert torch.allclose(fused.rows(ws, ls), torch.stack([products(w, l) for w, l in zip(ws, ls)]), rtol=1e-6)
    expected = [w - 0.5 * l for w, l in zip(ws, ls)]
    fused.mix(ws, ls, *(torch.full((3,), c, dtype=torch.float64) for c in (1.0, -0.5)))
    assert all(torch.allclose(w, x, atol=1e-6) for w, x in zip(ws, expected))


def test_a_mixture_cancels_to_the_last_digit(loops):
    """Rounding is that of what is left, not of the two gradients, unless a compiler multiplies and adds one after the other."""
    torch.manual_seed(0)
    rounding = 1e-10 if loops == "C++" else 3e-8
    for a, b in ((1.0, -0.7133), (0.31, -0.2977)):
        l = torch.randn(1 << 16)
        w = -b / a * l + 1e-4 * torch.randn(1 << 16)
        exact = a * w.double() + b * l.double()
        fused.mix([w], [l], *(torch.tensor([c], dtype=torch.float64) for c in (a, b)))
        assert (w - exact).norm() <= 1e-7 * exact.norm() + rounding * l.norm()


def test_autograd_sees_that_a_gradient_was_changed():
    w, x = torch.ones(100), torch.ones(100, requires_grad=True)
    loss = (x * w).sum()
    assert fused.mix([w], [torch.ones(100)], *[torch.full((1,), c, dtype=torch.float64) for c in (1, -0.5)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def problem(seed=0, dtype=torch.float32, device="cpu"):
    torch.manual_seed(seed)
    params = [torch.nn.Parameter((0.1 * torch.randn(shape)).to(device, dtype)) for shape in SHAPES]
    targets = [[torch.randn(p.shape).to(device) for p in params] for _ in range(2)]

    def loss(side):
        scale = 1 + 0.5 * side
        return sum(((p.float() - t - targets[0][i]) ** 2).sum() * scale for i, (p, t) in enumerate(zip(params, targets[side])))

    return params, lambda: loss(0), lambda: loss(1)


def trained(base, options, steps=4, fuse=True, wrap=ProjectedGradient, dtype=torch.float32, device="cpu", **more):
    params, winner, loser = problem(dtype=dtype, device=device)
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "lr": 3e-3}]
    opt = wrap(base(groups, lr=1e-3, **options), fused=fuse, **more)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt.base, lambda k: 1 / (k + 1))
    reports = []
    for k in range(steps):
        reports.append(opt.step(winner, loser) if k != 2 else opt.step(winner))
        scheduler.step()
    return params, opt, reports


def agree(found, expected, rel=2e-6):
    """In norm: where the mixture cancels to nothing, an adaptive base makes a whole step of what rounding left."""
    p, q, before = (torch.cat([x.detach().float().flatten().cpu() for x in xs]) for xs in (found, expected, problem()[0]))
    assert (p - q).norm() <= rel * (q - before).norm() + 1e-7 * q.norm()


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_fused_steps_equal_the_base_s_own(loops, name, scope):
    base, options = BASES[name]
    params, opt, reports = trained(base, options, max_norm=3.0, scope=scope)
    expected, other, theirs = trained(base, options, fuse=False, max_norm=3.0, scope=scope)
    assert opt.unfused == ""
    agree(params, expected)
    for p, q in zip(params, expected):
        assert opt.state[p].keys() == other.state[q].keys()
        for key, value in other.state[q].items():
            assert (opt.state[p][key] - value).norm() <= 1e-5 * value.norm()
    for mine, its in zip(reports, theirs):
        assert mine.grad_norm == pytest.approx(its.grad_norm, rel=1e-5)
    assert (params[0] - problem()[0][0]).abs().max() > 1e-4  # so that an agreement to 1e-7 says something


def test_a_fused_step_never_writes_the_mixture():
    """From its second step on: the base begins by itself, so that its state is its own."""
    params, winner, loser = problem()
    opt = ProjectedGradient(torch.optim.RMSprop(params, lr=1e-3), fused=True)
    seen = []
    original = opt.base.step
    opt.base.step = lambda *a: seen.append(1) or original(*a)
    for _ in range(3):
        opt.step(winner, loser)
    assert len(seen) == 1 and all(p.grad is None for p in params)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_what_a_fused_step_changed_is_measured(scope):
    options = {"momentum": 0.9}
    _, opt, reports = trained(torch.optim.SGD, options, measure_change=True, scope=scope)
    _, _, theirs = trained(torch.optim.SGD, options, fuse=False, measure_change=True, scope=scope)
    assert opt.unfused == "" and reports[2].loss_changes is None
    for k in (0, 1, 3):
        winner = theirs[k].loss_changes[0]
        assert reports[k].loss_changes == pytest.approx(theirs[k].loss_changes, rel=1e-5, abs=1e-7 * abs(winner))
        assert reports[k].change_cosines == pytest.approx(theirs[k].change_cosines, abs=1e-5)


def test_a_checkpoint_is_the_base_s(tmp_path):
    base, options = BASES["AdamW"]
    params, opt, _ = trained(base, options)
    plain = base([{"params": params[: len(params) // 2]}, {"params": params[len(params) // 2 :]}], lr=1.0)
    plain.load_state_dict(opt.state_dict())
    assert all(state["step"] == 4 for state in plain.state.values())


@pytest.mark.parametrize("form", [torch.bfloat16, "int8", "cpu"])
def test_a_gradient_that_was_set_aside_is_read_as_it_is(form):
    params, _, reports = trained(torch.optim.RMSprop, {}, set_aside=form)
    expected, _, theirs = trained(torch.optim.RMSprop, {}, fuse=False, set_aside=form)
    agree(params, expected)
    assert reports[1].cosine == pytest.approx(theirs[1].cosine, abs=1e-7)
    assert routes.whole((), Stored(torch.zeros(128), "int8")) is None


def test_bf16_parameters():
    params, opt, _ = trained(torch.optim.SGD, {}, dtype=torch.bfloat16)
    expected, _, _ = trained(torch.optim.SGD, {}, fuse=False, dtype=torch.bfloat16)
    assert opt.unfused == ""
    agree(params, expected, rel=2**-6)  # torch rounds to bfloat16 after every operation


@pytest.mark.gpu
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_steps_on_a_gpu_equal_the_base_s_own(name, dtype):
    base, options = BASES[name]
    found, opt, reports = trained(base, options, max_norm=3.0, dtype=dtype, device="cuda")
    expected, _, theirs = trained(base, options, fuse=False, max_norm=3.0, dtype=dtype, device="cuda")
    assert opt.unfused == ""
    agree(found, expected, rel=2e-6 if dtype == torch.float32 else 2**-5)
    assert reports[1].cosine == pytest.approx(theirs[1].cosine, abs=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_passes_on_a_gpu_equal_the_reference(dtype):
    ws, ls = ([x.to("cuda") for x in xs] for xs in lists(dtype=dtype))
    numbers, reference = gram(ws, ls, rows=fused.rows(ws, ls)), gram(ws, ls)
    assert all(torch.allclose(got, expected, rtol=1e-12) for got, expected in zip(numbers[:3], reference[:3]))
    one, other = (c.to("cuda") for c in coefficients(-0.7))
    expected = [w.clone() for w in ws]
    for k, (w, l) in enumerate(zip(expected, ls)):
        mix_(w, l, one[k], other[k])
    assert fused.mix(ws, ls, one, other)
    eps = torch.finfo(dtype).eps
    assert all(torch.allclose(got, want, rtol=2 * eps, atol=4 * eps) for got, want in zip(ws, expected))


def test_other_rules():
    for rule in (projection.normalized, projection.interval(0.2), projection.mgda, projection.watch):
        params, _, _ = trained(torch.optim.SGD, {}, wrap=lambda base, rule=rule, **o: PairedGradient(base, rule, **o))
        expected, _, _ = trained(
            torch.optim.SGD, {}, fuse=False, wrap=lambda base, rule=rule, **o: PairedGradient(base, rule, **o)
        )
        agree(params, expected)


@pytest.mark.parametrize(
    ("base", "options", "wrapper", "why"),
    [
        (torch.optim.Adagrad, {}, {}, "Adagrad has no fused form"),
        (torch.optim.Adam, {"amsgrad": True}, {}, "Adam with amsgrad"),
        (torch.optim.RMSprop, {"centered": True}, {}, "RMSprop with centered"),
        (torch.optim.SGD, {}, {"metric": "optimizer"}, "metric='optimizer' needs"),
    ],
)
def test_what_cannot_be_fused_says_why_once(base, options, wrapper, why, recwarn):
    params, opt, _ = trained(base, options, **wrapper)
    expected, _, _ = trained(base, options, fuse=False, **wrapper)
    told = [str(w.message) for w in recwarn if "fused=True" in str(w.message)]
    assert len(told) == 1 and why in told[0] and opt.unfused.startswith(why)
    agree(params, expected, rel=1e-4)


def test_a_rank_that_holds_nothing_has_nothing_to_step():
    params = [torch.nn.Parameter(torch.empty(0))]
    none, one = [None], torch.ones(1, dtype=torch.float64)
    base = torch.optim.Adam(params)
    assert fused.step(base, [Entry(base.param_groups[0], params[0], None, None)], one, -one)
    assert fused.rows(none, none).tolist() == [[0.0, 0.0, 0.0]]


def test_hooks_of_the_base_are_called(recwarn):
    params, winner, loser = problem()
    base = torch.optim.SGD(params, lr=1e-3)
    called = []
    base.register_step_post_hook(lambda *_: called.append(1))
    opt = ProjectedGradient(base, fused=True)
    opt.step(winner, loser)
    assert called == [1] and "step hooks" in opt.unfused


@pytest.mark.parametrize("case", ["none", "fails", "torch.compile fails"])
def test_without_a_compiler_the_step_is_taken_all_the_same(monkeypatch, recwarn, tmp_path, case):
    def fail(*_, **__):
        raise RuntimeError("no C++ compiler\nand a long trace")

    if case == "torch.compile fails":
        monkeypatch.setattr(native, "unfit", lambda columns, _: {*range(len(columns[0]))})
        monkeypatch.setattr(fused, "_ready", {})
        monkeypatch.setattr(torch, "compile", fail)
        why = "torch.compile fails here (RuntimeError: no C++ compiler)"
    elif case == "fails":
        broken = tmp_path / "broken"
        broken.write_text("#!/bin/sh\necho 'loops.cpp: error: no OpenMP' >&2; exit 1\n")
        broken.chmod(0o755)
        monkeypatch.setenv("CXX", str(broken))
        why = f"the C++ compiler {broken} fails here (loops.cpp: error: no OpenMP)"
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        why = "there is no C++ compiler here"
    native.library.cache_clear()
    try:
        params, opt, _ = trained(torch.optim.RMSprop, {})
    finally:
        native.library.cache_clear()
    expected, _, _ = trained(torch.optim.RMSprop, {}, fuse=False)
    assert all(torch.equal(p, q) for p, q in zip(params, expected))
    told = [str(w.message) for w in recwarn if "fused=True" in str(w.message)]
    assert len(told) == 1 and why in told[0] and opt.unfused.startswith(why)


def test_a_loss_that_is_no_number_is_skipped():
    params, winner, loser = problem()
    before = [p.detach().clone() for p in params]
    opt = ProjectedGradient(torch.optim.SGD(params, lr=1e-3), fused=True)
    assert opt.step(lambda: winner() * float("nan"), loser).skipped and opt.skipped_steps == 1
    assert all(torch.equal(p, q) for p, q in zip(params, before)) and all(p.grad is None for p in params)
