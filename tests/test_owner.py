"""Who counts what: eight fake ranks of every layout together count each element once, and find out the same (PITFALLS S8)."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from ogdopt.distributed import _reduce
from ogdopt.gram import gram
from tests.gradients import inner

R, S0, S1 = Replicate(), Shard(0), Shard(1)
SHAPES = [(5, 3), (8, 16), (1,), (16, 3)]  # (5, 3) and (1,) leave ranks empty
LAYOUTS = {
    "FSDP": ((8,), [(S0,)] * 4),
    "HSDP 2x4": ((2, 4), [(R, S0)] * 4),
    "HSDP 4x2": ((4, 2), [(R, S0)] * 4),
    "FSDP x TP": ((4, 2), [(S0, R), (S0, S1), (S0, R), (S0, S0)]),
    "HSDP x TP": ((2, 2, 2), [(R, S0, R), (R, S0, S1), (R, S0, R), (R, S0, S0)]),
    "TP": ((8,), [(R,), (S1,), (R,), (S0,)]),
    "TP beside plain": ((8,), [None, (S1,), None, (S0,)]),
    "three ranks": ((3,), [(S0,), (R,), None, (S1,)]),
    "DDP": ((8,), [None] * 4),
}


def ranks(shape, placements, spoil=None, dtype=torch.float32, group=False, **options):
    """What `gram` finds on each rank: all send their one message, then all get the sum of the messages.

    `spoil(rank, winner, loser)` may change what one rank holds.
    """
    world, real = math.prod(shape), dist.all_reduce

    def one(rank, answer):
        sent = []

        def all_reduce(message, group=None):
            sent.append(message.clone())
            if answer is not None:
                message.copy_(answer)

        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        dist.all_reduce = all_reduce
        try:
            mesh = init_device_mesh("cpu", shape)
            sides = [
                [w if p is None else distribute_tensor(w, mesh, p, src_data_rank=None) for w, p in zip(side, placements)]
                for side in whole(dtype)
            ]
            if spoil is not None:
                spoil(rank, *sides)
            numbers = gram(*sides, dist.group.WORLD if group else None, **options)
        finally:
            dist.all_reduce = real
            dist.destroy_process_group()
        assert len(sent) == 1 and sent[0].dtype == torch.float64
        return sent[0], numbers

    answer = torch.stack([one(rank, None)[0] for rank in range(world)]).sum(0)
    return [one(rank, answer)[1] for rank in range(world)]


def whole(dtype):
    """The winner's and the loser's gradients before anything is sharded."""
    torch.manual_seed(0)
    return [[torch.randn(n, dtype=dtype) for n in SHAPES] for _ in range(2)]


def truth():
    w, x = whole(torch.float32)
    return [[inner([a], [b]) for a, b in zip(*pair)] for pair in ((w, w), (w, x), (x, x))]


def local(g):
    return g.to_local() if isinstance(g, DTensor) else g


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_counts_once(layout):
    for numbers in ranks(*LAYOUTS[layout]):
        for got, want in zip(numbers[:3], truth()):
            assert got.tolist() == pytest.approx(want, rel=1e-12)
        assert numbers.fault == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_rank_is_enough_to_make_the_numbers_not_finite(layout, value):
    """Also where the rank holds a copy that others hold too; and it counts as not finite, not as a difference."""

    def spoil(rank, winner, loser):
        if rank == 2:
            local(winner[1]).fill_(value)

    for numbers in ranks(*LAYOUTS[layout], spoil=spoil):
        assert not numbers.ww[1].isfinite() and numbers.ww[0].isfinite() and numbers.fault == 0


@pytest.mark.parametrize("layout", ["DDP", "TP", "TP beside plain", "three ranks"])
@pytest.mark.parametrize("side", [0, 1])
def test_copies_that_differ_are_found_by_every_rank(layout, side):
    def spoil(rank, *sides):
        if rank == 1:
            local(sides[side][2]).mul_(2)

    for numbers in ranks(*LAYOUTS[layout], spoil=spoil):
        assert numbers.fault == 3 and numbers.ww.isnan().all() and numbers.ranks.shape == (math.prod(LAYOUTS[layout][0]), 6)


@pytest.mark.parametrize(
    ("dtype", "change", "fault"), [(torch.float32, 1e-9, 0), (torch.float32, 1e-5, 3), (torch.bfloat16, 1e-5, 0)]
)
def test_copies_may_differ_by_the_rounding_of_their_type(dtype, change, fault):
    """`change` is relative to |g_w|^2: redundantly computed copies of 16-bit gradients are not equal to 1e-6."""

    def spoil(rank, winner, loser):
        if rank == 1:  # one more gradient of that share of the whole's square, in a type that holds it
            square = sum(inner([g], [g]) for g in winner)
            winner[2] = torch.tensor([(float(winner[2]) ** 2 + change * square) ** 0.5], dtype=torch.float64)

    for numbers in ranks((2,), [None] * 4, spoil=spoil, dtype=dtype):
        assert numbers.fault == fault


def test_equal_shards_are_copies():
    assert all(numbers.fault == 4 for numbers in ranks((2,), [None] * 4, group=True))


def test_shards_of_equal_size_are_not_copies():
    """Two ranks that own a tensor each, with gradients of the same norm: the place of the tensor tells them apart."""

    def spoil(rank, *sides):
        for side in sides:
            side[:] = [torch.ones(4) if i == rank else None for i in range(4)]

    for numbers in ranks((2,), [None] * 4, spoil=spoil, group=True):
        assert numbers.fault == 0 and numbers.ww.tolist() == [4.0, 4.0, 0.0, 0.0]


@pytest.mark.parametrize("side", [0, 1])
def test_a_side_without_gradient_anywhere_is_told_from_one_without_it_here(side):
    def nowhere(rank, *sides):
        sides[side][:] = [None] * 4

    def elsewhere(rank, *sides):
        if rank != 1:
            sides[side][:] = [None] * 4

    expected = {"expected": (True, True), "group": True}
    assert all(n.fault == side + 1 for n in ranks((2,), [None] * 4, spoil=nowhere, **expected))
    assert all(n.fault == 0 for n in ranks((2,), [None] * 4, spoil=elsewhere, **expected))


def test_a_rank_without_any_gradient_takes_part():
    def spoil(rank, *sides):
        if rank == 1:
            for side in sides:
                side[:] = [None] * 4

    for numbers in ranks((2,), [None] * 4, spoil=spoil, group=True, device=torch.device("cpu")):
        for got, want in zip(numbers[:3], truth()):
            assert got.tolist() == pytest.approx(want, rel=1e-12)


def test_the_threshold_of_parallel_gradients_counts_every_rank_s_part():
    """One rank's shard of one tensor is bfloat16: that tensor's threshold lies in between, the others' stay, on both ranks."""

    def spoil(rank, *sides):
        if rank == 1:
            for side in sides:
                side[0] = side[0].bfloat16()

    one, other = [numbers.parallel for numbers in ranks((2,), [None] * 4, spoil=spoil, group=True)]
    assert torch.equal(one, other)
    assert 1e-6 < one[0] < 32 * 2.0**-16
    assert one[1:].tolist() == pytest.approx([1e-12] * 3)


@pytest.mark.parametrize("backends", [None, "meta:some", "cpu:gloo,meta:some"])
def test_numbers_travel_on_a_device_that_the_group_can_talk_from(monkeypatch, backends):
    """Offloaded gradients are on the CPU and their mesh is not: the message goes to the mesh's device first."""

    class SentError(Exception):
        pass

    def all_reduce(message, group=None):
        raise SentError(message.device.type)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    meshes = [] if backends else [SimpleNamespace(device_type="meta")]
    with pytest.raises(SentError, match="cpu" if backends == "cpu:gloo,meta:some" else "meta"):
        _reduce([torch.zeros(4, 3, dtype=torch.float64)], meshes, None)
