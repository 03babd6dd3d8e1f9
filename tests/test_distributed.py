"""One process, two and four agree in every layout; every rank decides alike; misuse is refused on every rank.

The ranks of one world run all of its cases in one launch (`workers/two_gradients.py`); the tests read what they wrote.
"""

import fcntl
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import limits
from tests.workers.two_gradients import MAX_NORM, OPTIONS, train

ROOT = Path(__file__).parent.parent
WORKER = str(ROOT / "tests" / "workers" / "two_gradients.py")


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node"]


def launch(ranks, folder, *words, worker=WORKER, launcher=TORCHRUN):
    """Run a worker under torch's launcher, or another, with a time limit; its exit and what it said on the way."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", *launcher, str(ranks), worker, str(folder), *words],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as child:
        try:
            said, _ = child.communicate(timeout=limits.PROCESS)
        except subprocess.TimeoutExpired:
            child.terminate()  # the launcher takes its ranks with it
            said, _ = child.communicate()
    return {"code": child.returncode, "said": said}


def once(tmp_path_factory, name, work):
    """The folder `name` of this run of the tests, filled by `work(folder)` once, whatever number of test workers there are.

    What it returns, a launch's end, has to be a success.
    """
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    base = tmp_path_factory.getbasetemp().parent / f"once-{run}" if run else tmp_path_factory.getbasetemp() / "once"
    folder = base / name
    folder.mkdir(parents=True, exist_ok=True)
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = base / f"{name}.json"
        if not done.exists():
            done.write_text(json.dumps(work(folder)))
    end = json.loads(done.read_text())
    assert end["code"] == 0, f"{name} ended with {end['code']}:\n{end['said'][-12000:]}"
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What the ranks of a world wrote, a list with one table a rank."""

    @functools.cache
    def results(ranks):
        folder = once(tmp_path_factory, f"{ranks}-ranks", lambda folder: launch(ranks, folder))
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]

    return lambda ranks, case: [table[case] for table in results(ranks)]


@functools.cache
def alone(kind, option=None):
    return train(kind, **OPTIONS.get(option, {}))


# ---- the same training ---------------------------------------------------------------------------------------------------

# PITFALLS S7, S8, S10 (scalars over shards and copies), S11 (accumulate), S21 (FSDP1's clip), S22 (uneven_batches), S4 (views).
LAYOUTS = [
    (2, "fsdp2", "mistral"),
    (2, "fsdp2_offload", "mistral"),
    (2, "fsdp2_accumulate", "mistral"),
    (2, "fsdp2_uneven", "toy"),
    (2, "ddp", "mistral"),
    (2, "ddp_views", "mistral"),
    (2, "ddp_accumulate", "mistral"),
    (2, "ddp_static", "mistral"),
    (2, "ddp_unused", "toy"),
    (2, "ddp_uneven_batches", "mistral"),
    (2, "fsdp1_flat", "mistral"),
    (2, "fsdp1_params", "mistral"),
    (2, "fsdp1_accumulate", "mistral"),
    (2, "fsdp1_no_shard", "mistral"),
    (2, "fsdp2_several", "mistral"),
    (2, "ddp_several", "mistral"),
    (2, "tp_mixed", "mistral"),
    (2, "tp_sequence", "block"),
    (4, "hsdp", "mistral"),
    (4, "hsdp_accumulate", "mistral"),
    (4, "hsdp_uneven", "toy"),
    (4, "fsdp_tp", "block"),
]


@pytest.mark.parametrize(("ranks", "case", "kind"), LAYOUTS)
def test_many_ranks_take_the_steps_of_one(world, ranks, case, kind):
    """Ten RMSprop steps: parameters within 1e-6, numbers within 1e-6 of their scale, every decision the same."""
    agree(world(ranks, case), alone(kind), 1e-6, 1e-6)


CURVATURE = 5.0
"""By how much of itself |g|^2 changes for each unit that one parameter moves: 2 |H g|_inf / |g|^2 is 0.9 to 4.6 here."""


def agree(results, one, scalars, parameters):
    """Parameters within a limit, or, for the few that a rounding may move further, the bound of `Leeway`; numbers alike."""
    limit = sum(one["slack"]).clamp(min=parameters)
    assert (limit > 5 * parameters).double().mean() < 0.1  # so that the bound is no excuse
    for result in results:
        off, spread = 0.0, torch.zeros_like(limit)  # before this step: the largest part of the bound over the limit, and all
        for got, want, slack in zip(result["numbers"], one["numbers"], one["slack"], strict=True):
            assert (got["skipped"], got["clipped"]) == (want["skipped"], want["clipped"])
            ww, _, ll, norm = want["scalars"]
            for x, y, scale in zip(got["scalars"], want["scalars"], (ww, (ww * ll) ** 0.5, ll, norm), strict=True):
                assert x == pytest.approx(y, rel=0, abs=(scalars + CURVATURE * off) * scale)
            far = torch.where(slack > parameters, slack, 0.0)
            turned = 2 * far.norm().item() / want["moved"] if got["cosines"] else 0.0  # of the change, by what is off in it
            assert got["cosines"] == pytest.approx(want["cosines"], rel=0, abs=1e-5 + turned + CURVATURE * off)
            spread += far
            off = spread.max().item()
        difference = (torch.tensor(result["parameters"]) - torch.tensor(one["parameters"])).abs()
        assert (difference <= limit).all(), (difference / limit).max()
    assert len({result["digest"] for result in results}) == 1


WAYS = [
    (2 if layout != "hsdp" else 4, layout, option)
    for layout in ("fsdp2", "ddp", "fsdp1", "hsdp")
    for option in OPTIONS
    if option != "recompute" or layout in ("fsdp2", "hsdp")
]
ROUNDED = {"bfloat16": (1e-3, 5e-6), "int8": (5e-3, 2e-5), "preserve_int8": (5e-3, 2e-5)}
"""Of a packed loser: tolerance of the numbers, and of parameters that moved by up to 1e-3; shards round at other borders."""


@pytest.mark.parametrize(("ranks", "layout", "option"), WAYS)
def test_every_way_of_stepping_is_the_same_on_many_ranks(world, ranks, layout, option):
    agree(world(ranks, f"{layout}_{option}"), alone("mistral", option), *ROUNDED.get(option, (1e-6, 1e-6)))


@pytest.mark.parametrize("option", ["metric", "adam"])
def test_in_the_optimizers_metric_every_step_keeps_its_promise_on_many_ranks(world, option):
    cosines = [n["cosines"] for layout in ("fsdp2", "ddp", "fsdp1") for n in world(2, f"{layout}_{option}")[0]["numbers"]]
    assert len(cosines) == 30 and all(winner < 0 and loser > -1e-5 for winner, loser in cosines)


@pytest.mark.parametrize("case", ["fsdp2_zero", "fsdp2_opposed", "ddp_zero", "fsdp1_tiny"])
def test_old_momentum_costs_winners_nothing_where_losers_have_no_say_on_many_ranks(world, case):
    """A loser's gradient of zero, or against the winner's, after steps the other way."""
    results = world(2, f"turned_{case}")
    assert results[0] == results[1] and results[0][0] < 0 <= results[0][1]


@pytest.mark.parametrize("kind", MAX_NORM)
def test_the_reference_clips_some_steps_moves_and_skips_none(kind):
    one = alone(kind)
    assert 0 < sum(n["clipped"] for n in one["numbers"]) < len(one["numbers"]) and one["skipped"] == 0
    start = torch.tensor(train(kind, steps=0)["parameters"])
    moved = (torch.tensor(one["parameters"]) - start).abs()
    assert moved.max() > 5e-4  # so that an agreement to 1e-6 says something


# PITFALLS S9: the norm's gradient is Partial in tp_sequence.
@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        (2, "gathered_fsdp2"),
        (2, "gathered_bf16"),
        (2, "gathered_bf16_reduce"),
        (2, "gathered_tp_sequence"),
        (4, "gathered_hsdp"),
    ],
)
def test_numbers_and_mixture_equal_those_of_gathered_gradients(world, ranks, case):
    for result in world(ranks, case):
        assert result["scalars"] < 1e-12 and result["gradient"] < 1e-7
        assert result["dtype"] == "{torch.float32}"


# ---- what it costs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "case", "partial"),
    [
        (2, "count_fsdp2", 0),
        (2, "count_ddp", 0),
        (2, "count_fsdp1", 0),
        (2, "count_tp_mixed", 0),
        (2, "count_tp_sequence", 4),
        (4, "count_hsdp", 0),
        (4, "count_fsdp_tp", 0),
    ],
)
def test_one_collective_and_one_read_a_step(world, ranks, case, partial):
    """One own all-reduce; a Partial gradient costs one more. The host waits once in step() and not in project()."""
    for result in world(ranks, case):
        expected = {"allreduce_": 1} | ({"all_reduce": partial} if partial else {})
        assert result["own"] == expected
        assert sum(result["plain"].values()) > 0  # the counter sees the layout's own
        assert result["reads"] == [1, 0]


# ---- every rank decides alike (PITFALLS S26) -----------------------------------------------------------------------------


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("what", ["nan", "inf", "loss"])
@pytest.mark.parametrize("layout", ["fsdp2", "ddp", "fsdp1"])
def test_what_one_rank_sees_all_skip(world, layout, what, side):
    results = world(2, f"spoiled_{layout}_{what}_{side}")
    for result in results:
        assert [n["skipped"] for n in result["numbers"]] == [False, True, False] and result["skipped"] == 1
    assert results[0]["digest"] == results[1]["digest"]


@pytest.mark.parametrize("layout", ["fsdp2", "ddp", "tp"])
def test_a_gradient_that_is_not_finite_on_one_rank_alone(world, layout):
    for result in world(2, f"spoiled_here_{layout}"):
        assert result == {"skipped": True, "still": True}


# ---- misuse --------------------------------------------------------------------------------------------------------------

PENDING = r"the loser's pass ended with gradients that are not synchronized.*{}.*Switch synchronization on"
DRIFT = r"the ranks hold different gradients.*{}.*The first ranks' \|g_w\|\^2"
COPIES = "process_group= says that each rank holds a shard.*the ranks hold equal gradients.*Leave process_group= out"
MISUSE = [
    (2, "S1_whole_side", PENDING.format(r"set_requires_gradient_sync\(False\)")),
    (2, "S1_last_micro_batch", PENDING.format(r"set_requires_gradient_sync\(False\)")),
    (2, "S1_whole_side_model", PENDING.format(r"set_requires_gradient_sync\(False\)")),
    (2, "S1_last_micro_batch_model", PENDING.format(r"set_requires_gradient_sync\(False\)")),
    (4, "S2_all_reduce", PENDING.format(r"set_requires_all_reduce\(False\)")),
    (4, "S2_all_reduce_model", PENDING.format(r"set_requires_all_reduce\(False\)")),
    (2, "S3_stale", r"built on other parameters than the model's \(build it after sharding\)"),
    (2, "S5_crossed", DRIFT.format("give each side its own forward and backward")),
    (2, "S6_ddp", DRIFT.format(r"DDP inside no_sync\(\)")),
    (2, "S6_ddp_project", DRIFT.format(r"DDP inside no_sync\(\)")),
    (2, "S6_ddp_scaler", DRIFT.format(r"DDP inside no_sync\(\)")),
    (2, "S6_ddp_model", r"the winner's pass ended.*DistributedDataParallel is inside no_sync\(\)"),
    (2, "S6_fsdp1_model", r"the winner's pass ended.*FullyShardedDataParallel is inside no_sync\(\)"),
    (2, "S23_functional", r"the winner's pass left no gradient.*torch\.autograd\.grad leaves p\.grad alone"),
    (2, "fsdp1_without_group", DRIFT.format(r"process_group=dist\.group\.WORLD")),
    (2, "fsdp1_elementless_without_group", DRIFT.format(r"process_group=dist\.group\.WORLD")),
    (2, "fsdp1_no_loser", "the loser's pass left no gradient on any rank. Either no backward ran"),
    (2, "S8_ddp_with_group", COPIES),
    (2, "S8_no_shard_with_group", COPIES),
    (2, "half_sharded", DRIFT.format("apply it to the root module too")),
    (2, "separate_models", DRIFT.format(r"process_group=dist\.new_subgroups\(group_size=1\)\[0\]")),
    (2, "mesh_slice", "on a mesh of 1 ranks, but 2 ranks take part.*process_group="),
    (4, "mesh_slice", "on a mesh of 2 ranks, but 4 ranks take part.*process_group="),
    (2, "stepped_inside", "the base stepped inside loser"),
    (2, "ddp_recompute", "under DDP or FSDP1 it is not yet averaged then; shard the model with fully_shard"),
]


@pytest.mark.parametrize(("ranks", "case", "message"), MISUSE, ids=lambda x: str(x) if len(str(x)) < 40 else "")
def test_misuse_is_refused_on_every_rank_alike(world, ranks, case, message):
    results = world(ranks, case)
    for result in results:
        assert result["error"] == ("ValueError" if case == "mesh_slice" else "GradientError"), result["text"]
        assert re.search(message, result["text"], re.DOTALL), result["text"]
    assert len({result["text"] for result in results}) == 1


@pytest.mark.parametrize("layout", ["fsdp2", "ddp"])
def test_clipping_by_hand_between_contexts_and_step_works_on_many_ranks(world, layout):
    """torch's clip sees the whole winner's gradient, and bounds the step; each rank tells it, but of DTensors."""
    seen = alone("mistral")["numbers"][0]["scalars"][0] ** 0.5
    for found in world(2, f"by_hand_{layout}"):
        assert found["seen"] == pytest.approx(seen, rel=1e-5)
        assert 0 < found["moved"] <= 1.001e-3 and found["told"] == (layout == "ddp")


def test_ranks_that_train_models_of_their_own_each_reduce_alone(world):
    results = world(2, "separate_models_alone")
    for result in results:
        assert result["ll"] == pytest.approx(result["alone"], rel=1e-9)
    assert results[0]["ll"] != results[1]["ll"]


def test_a_rank_without_an_element_joins_the_others(world):
    """FSDP1 gives rank 1 no part of the one parameter that the optimizer holds: no gradient there, and no hang."""
    results = world(2, "fsdp1_elementless")
    assert [result["held"] > 0 for result in results] == [True, False]
    for result in results:
        assert result["ll"] == pytest.approx(result["alone"], rel=1e-6) and result["ll"] > 0
        assert result["plain"] == pytest.approx(result["ll"], rel=1e-12)  # an ordinary backward and step() too
