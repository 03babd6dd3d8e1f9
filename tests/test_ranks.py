"""Training on several processes is training on one: same steps, same resume, one message a logged step, no one left behind."""

import functools
import json
import shutil
import signal

import pytest
import torch

from ogdopt_harness.common.ranks import Ranks
from ogdopt_harness.data.batches import deal, slots
from ogdopt_harness.training import progress
from tests import small
from tests.test_distributed import ROOT, launch, once
from tests.workers import training

WORKER = str(ROOT / "tests" / "workers" / "training.py")
SAME = ["plain:ogd", "uneven:dpo", "budget:sft", "recomputed:ogd", "lora:ogd", "plain:maxright_ogd", "plain:kto", "plain:npo"]
SAME += ["plain:npo_pair", "uneven:sparse", "free:sparse", "damped:reward_model", "probed:dpo"]
LOADING = ["loading:plain", "loading:lora"]
ODD = ["counted:dpo", "counted:ogd", "seldom:ogd", "spoiled:ogd", "patience:", "differing:npo_pair"]
NUMBERS = ("tokens_per_second", "padding")


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return small.tokenizer(tmp_path_factory.mktemp("tok"))


@pytest.fixture(scope="module")
def worlds(tok, tmp_path_factory):
    """What ranks wrote: `ask(case, ranks)`. One launch of two ranks and one of four; runs that go on meet in folders."""
    goes_on = ["goon:ogd@from1", "cut:ogd@from2", "cut:ogd@back", "cut:ogd@same", "goon:ogd@same"]
    cases = {2: [*LOADING, *SAME, *goes_on, *ODD], 4: ["uneven:dpo", "goon:ogd@from2"]}

    def work(n, folder):
        if n == 2:
            training.run(folder / "from1", tok, "plain", "ogd", stop=3)
        else:
            shutil.copytree(launched(2) / "from2", folder / "from2")
        return launch(n, folder, *cases[n], worker=WORKER)

    @functools.cache
    def launched(n):
        return once(tmp_path_factory, f"training-{n}", functools.partial(work, n))

    def ask(case, ranks):
        files = [launched(ranks) / f"{case.replace(':', '-')}.{ranks}.{rank}.json" for rank in range(ranks)]
        return [json.loads(file.read_text()) for file in files]

    ask.folder = launched
    return ask


def agree(found, expected, atol=1e-6):
    torch.testing.assert_close(torch.tensor(found["parameters"]), torch.tensor(expected["parameters"]), rtol=0, atol=atol)
    assert len(found["lines"]) == len(expected["lines"])
    for got, want in zip(found["lines"], expected["lines"], strict=True):
        assert got.keys() == want.keys()
        assert all(got[k] == pytest.approx(want[k], rel=1e-3, abs=1e-3) for k in want if k not in NUMBERS)


@pytest.fixture(scope="module")
def whole(tok, tmp_path_factory):
    return training.run(tmp_path_factory.mktemp("whole") / "run", tok, "plain", "ogd")


@pytest.mark.parametrize(("case", "ranks"), [*((case, 2) for case in SAME), ("uneven:dpo", 4)])
def test_many_processes_take_the_steps_of_one(case, ranks, worlds, tok, tmp_path):
    """13 rows: the last batch leaves ranks without a row of their own (PITFALLS S22), and they run one that does not count."""
    one = training.run(tmp_path / "one", tok, *case.split(":"))
    for found in worlds(case, ranks):
        agree(found, one)
    start = training.vector(training.trainer(tmp_path / "start", tok, *case.split(":")).scorer.model)
    assert (torch.tensor(one["parameters"]) - start).abs().max() > 1e-3  # so that an agreement to 1e-6 says something


def test_accelerate_launches_the_same_run(tok, tmp_path):
    pytest.importorskip("accelerate.commands.launch", reason="accelerate is not installed")
    settings = "--multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0 --num_processes"
    launcher = ["accelerate.commands.launch", *settings.split()]  # without GPUs too: it names this way of launching so
    end = launch(2, tmp_path, "uneven:ogd", worker=WORKER, launcher=launcher)
    assert end["code"] == 0, end["said"][-8000:]
    one = training.run(tmp_path / "one", tok, "uneven", "ogd")
    for rank in range(2):
        agree(json.loads((tmp_path / f"uneven-ogd.2.{rank}.json").read_text()), one)


@pytest.mark.parametrize(("case", "ranks"), [("goon:ogd@from1", 2), ("goon:ogd@from2", 4), ("goon:ogd@same", 2)])
def test_a_run_goes_on_with_other_processes(case, ranks, worlds, whole):
    """Stopped by SIGTERM in the middle of an epoch, then 1 -> 2, 2 -> 4 and 2 -> 2 processes, from another start."""
    for found in worlds(case, ranks):
        agree(found, whole)


def test_a_run_goes_on_in_one_process(worlds, whole, tok):
    """2 -> 1."""
    assert len(worlds("cut:ogd@back", 2)[0]["lines"]) == 4  # the start and three steps
    agree(training.run(worlds.folder(2) / "back", tok, "plain", "ogd", model_seed=99), whole)


def test_the_same_processes_go_on_bit_for_bit(worlds):
    for found, straight in zip(worlds("goon:ogd@same", 2), worlds("plain:ogd", 2)):
        assert found["parameters"] == straight["parameters"]


@pytest.mark.parametrize(("method", "messages"), [("dpo", 1), ("ogd", 2)])
def test_a_step_has_few_messages_and_logging_it_one(method, messages, worlds):
    """A step: the model's own gathers and reductions, one sum of Gram numbers, one more where changes are measured."""
    for found in worlds(f"counted:{method}", 2):
        for step, expected in (("step", 1), ("measured", messages)):
            own = {name: n for name, n in found[step][0].items() if not name.endswith("_base_")}
            assert own == {"allreduce_": expected}
        assert found["logging"][0] == {"allreduce_": 1}
        assert found["logging"][1] <= 1 or method == "ogd"  # figures of a step are read at once
        assert found["between"] == [{}, 0]  # steps that are not logged have no messages
        forwards = 2 if method == "ogd" else 1
        assert found["step"][1] - forwards * found["scoring"][1] <= 2


def test_a_signal_in_a_step_that_is_not_logged_is_heeded_at_the_next_message(worlds):
    """It comes to one process in the second step; the third is measured, which both learn of it by."""
    for found in worlds("seldom:ogd", 2):
        assert [line["step"] for line in found["lines"]] == [0, 3]


@pytest.mark.parametrize(("pace", "looks"), [(0.1, [0, 33, 66]), (3.0, [*range(80)])])
def test_signals_between_logged_steps_are_asked_for_every_few_seconds(pace, looks, monkeypatch):
    """In steps of 0.1 s, which take the slower of two processes 0.15 s, that is every 33rd; in slow ones each."""
    clock, seen, others = [0.0], [], [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(Ranks, "gather", lambda self, news: seen.append(step) or [news, [0.0, others[0], 0.0, 1.5 * news[2]]])
    signals = progress.Signals(Ranks(0, 2), [])
    for step in range(80):
        clock[0] += pace
        others[0] = signal.SIGTERM if step >= 40 else 0.0
        assert signals.look() == (signal.SIGTERM if step >= 40 and step in looks else 0)
    assert seen == looks


def test_a_loss_that_is_no_number_on_one_rank_is_skipped_by_all(worlds):
    assert worlds("spoiled:ogd", 2) == [{"still": True, "skipped": 1.0, "count": 1}] * 2


@pytest.mark.parametrize("case", LOADING)
def test_one_process_loads_and_writes_and_no_other_ever_holds_the_whole_model(case, worlds):
    """Weights, adapters and buffers (positions' frequencies are in no state dict) come over as they are, ties too. Of a model
    and a reference beside it, halves of both and a tensor are all that the second process has to hold."""
    first, second = worlds(case, 2)
    assert (first["loads"], second["loads"]) == (1, 0)
    for found in (first, second):
        assert found["other"] == [] and found["tied"]
    assert second["peak"] < 1.3 and (first["peak"] > 1.8 or case != LOADING[0])  # measured in fresh processes


def test_work_of_the_first_process_may_take_longer_than_a_collective(worlds):
    """And an error there ends the others too, who have nothing to say."""
    first, second = worlds("patience:", 2)
    assert first["found"] == second["found"] == "done" and "invalid literal" in first["error"] and second["error"] == ""


def test_pairs_that_are_mixed_by_themselves_are_the_same_everywhere(worlds):
    for found in worlds("differing:npo_pair", 2):
        assert "so they have different pairs" in found["error"]


# ---- micro-batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(("most", "budget"), [(1, None), (4, None), (4, 30), (64, 64), (3, 1)])
def test_every_row_goes_to_one_process_and_all_have_equally_many_micro_batches(size, most, budget):
    lengths = torch.randint(1, 25, (37,), generator=torch.Generator().manual_seed(0)).tolist()
    dealt = [deal(lengths, most, budget, rank, size) for rank in range(size)]
    assert len({len(micros) for micros in dealt}) == 1
    rows = [row for micros in dealt for micro in micros if micro.counts for row in micro.rows]
    assert sorted(rows) == list(range(37))
    for micros in dealt:
        assert all(len(micro.rows) <= most for micro in micros)
        assert all(budget is None or len(micro.rows) == 1 or slots(lengths, micro) <= budget for micro in micros)


def test_sorting_by_length_saves_padding():
    lengths = torch.randint(1, 100, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    sorted_slots = sum(slots(lengths, micro) for micro in deal(lengths, most=8))
    unsorted_slots = sum(8 * max(lengths[i : i + 8]) for i in range(0, 64, 8))
    assert sorted_slots < 0.7 * unsorted_slots and sorted_slots < 1.15 * sum(lengths)
