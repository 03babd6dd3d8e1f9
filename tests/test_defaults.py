"""Neither the default device nor the default type of new tensors matters: every tensor is made for what it is used with."""

import pytest
import torch

from ogdopt import AlternatingObjective, PairedGradient, ProjectedGradient, project, projection

WAYS = {
    "plain": {},
    "fused": {"fused": True},
    "clipped by block": {"max_norm": 0.1, "scope": "tensor"},
    "own metric": {"metric": "optimizer"},
    "own metric, measured": {"metric": "optimizer", "measure_change": True},
    "bfloat16": {"set_aside": torch.bfloat16},
    "int8": {"set_aside": "int8"},
    "host's memory": {"set_aside": "cpu"},
    "fused, bfloat16": {"set_aside": torch.bfloat16, "fused": True},
    "recompute": {"set_aside": "recompute"},
    "recompute by tensor": {"set_aside": "recompute", "scope": "tensor"},
}


def steps(options, dtype=torch.float32):
    generator = torch.Generator("cpu").manual_seed(0)
    sizes = [(64, 64), (5,), (5,), (3, 7)]
    params = [torch.nn.Parameter(torch.randn(s, generator=generator, device="cpu", dtype=dtype)) for s in sizes]
    targets = [[torch.randn(s, generator=generator, device="cpu", dtype=dtype) for s in sizes] for _ in range(2)]

    def loss(side):
        return torch.stack([(p - t).square().sum() for p, t in zip(params, targets[side])]).sum()

    # RMSprop counts its steps on the default device, where metric="optimizer" may not be able to read them.
    base = torch.optim.AdamW if "metric" in options else torch.optim.RMSprop
    opt = ProjectedGradient(base(params, lr=1e-2, weight_decay=0.1), **options)

    def run():
        for _ in range(3):
            report = opt.step(lambda: loss(0), lambda: loss(1))
        opt.step(lambda: loss(0))
        assert report.winner_loss > 0 and report.passes >= 0 and isinstance(report.parallel, bool)
        assert abs(report.cosine) <= 1 and report.grad_norm > 0 and opt.skipped_steps == 0
        return torch.cat([p.detach().flatten().double() for p in params])

    return run


@pytest.fixture
def default_type():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("way", WAYS)
def test_steps_under_another_default_device(way):
    expected, run = steps(WAYS[way])(), steps(WAYS[way])
    torch.set_default_device("meta")
    try:
        found = run()
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_steps_under_another_default_type(default_type, way, dtype):
    expected, run = steps(WAYS[way])(), steps(WAYS[way])
    default_type(dtype)
    assert torch.equal(run(), expected)


def test_rules_objectives_and_the_pure_function_under_another_default_device():
    w, l = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0])
    p = torch.nn.Parameter(torch.zeros(2))
    torch.set_default_device("meta")
    try:
        for rule in (*projection.RULES.values(), projection.interval(0.3), projection.scaled(projection.normalized, 0.5)):
            opt = PairedGradient(torch.optim.SGD([p], lr=0.0), rule)
            opt.step(lambda: (p * w).sum(), lambda: (p * l).sum())
            assert project(w, l, rule).device.type == "cpu"
        objective = AlternatingObjective({"a": 0.5, "b": 0.5}, seed=0)
        assert objective({"a": lambda: w.sum(), "b": lambda: l.sum()}).item() == 2.0
        opt.step(lambda: float((p.grad is None) or 1.0) if p.sum().backward() is None else 0.0)
        assert opt.report.winner_loss == 1.0
    finally:
        torch.set_default_device(None)
    assert project(w, l).tolist() == [0.0, 1.0]
