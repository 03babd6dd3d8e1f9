"""Every benchmark runs at its smallest setting, says what it should and names what is missing; its times are not judged."""

import json
import math
import subprocess
import sys
import warnings

import pytest
import torch

from benchmarks import (
    bench,
    common,
    gpu,
    growth,
    many_tensors,
    objectives,
    peers,
    profiled,
    projection,
    set_aside,
    step,
    tax_noise,
    trainers,
)
from benchmarks.common import Timed
from tests import limits

HERE = {name: common.absent(name) is None for name in common.PEERS}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """And nothing is compiled, here and in other processes: the formulas run as they stand (tests/test_fused.py compiles)."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    before = torch.get_num_threads()
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.set_num_threads(before)


def results(path):
    found = json.loads(path.read_text())
    assert found["versions"]["torch"] == torch.__version__ and found["machine"] and found["command"]
    return found["results"]


def test_ratios_are_of_neighbours_and_the_first_runs_are_left_out():
    now, costs = [0.0], iter([9, 9, 9, 9, 1, 2, 2, 6, 4, 20])  # base and method in turn: x2, x3, x5 behind the warm-up

    def spend():
        now[0] += next(costs)

    found = common.interleaved(Timed(spend), {"a": Timed(spend)}, 3, lambda: now[0])
    assert found == {"a": {"ratio": 3, "least": 2, "most": 5, "seconds": 6}}


def test_what_surrounds_a_run_is_not_timed():
    now, seen = [0.0], []

    def later(name, seconds):
        seen.append(name)
        now[0] += seconds

    timed = Timed(lambda: later("run", 1), lambda: later("before", 10), lambda: later("after", 100))
    assert timed.seconds(lambda: now[0]) == 1 and seen == ["before", "run", "after"]


def test_other_settings_of_malloc_do_not_reach_a_process(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    assert {k: v for k, v in common.variables(common.MEMORY).items() if k.startswith("MALLOC")} == {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }


def test_memory_is_measured_under_its_settings_alone():
    with pytest.raises(RuntimeError, match=r"began under common\.MEMORY"):
        common.added(lambda: None)
    sizes = "--mode none --size 5M --rounds 1".split()
    peak = json.loads(common.child("set_aside.py", *sizes, environment=common.MEMORY).splitlines()[-1])["peak"]
    assert 2 < peak < 3  # two gradients, the mixture's and the step's temporaries of the largest tensor


def test_a_script_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)set_aside\.py --rounds many failed.*invalid int value"):
        common.child("set_aside.py", "--rounds", "many")


# ---- projection --------------------------------------------------------------------------------------------------------


def test_projection(tmp_path, capsys):
    """Times, angles and memory in gradients: the textbook loop makes one, PCGrad nine, this library none."""
    projection.main(["--size", "5M", "--rounds", "1", "--bases", "RMSprop", "--output", str(tmp_path / "SIZE.json")])
    found = results(tmp_path / "5M.json")
    alone = found["alone"]
    assert found["parameters"] == 4_713_216
    measured = {name: entry for name, entry in alone.items() if isinstance(entry, dict)}
    assert all(entry["ratio"] > 0 and math.isfinite(entry["ratio"]) for entry in measured.values())
    assert abs(alone["ogdopt"]["left"]) < 1e-9 and abs(alone["ogdopt, clipped"]["left"]) < 1e-9
    assert all(abs(entry["left"]) < 1e-2 for entry in measured.values() if "left" in entry)
    assert 0.9 < alone["loop, (a * b).sum() and a - c b"]["memory"] < 1.6
    assert alone["ogdopt"]["memory"] < 0.5 and alone["ogdopt, clipped"]["memory"] < 0.5
    if HERE["pytorch_optimizer"]:
        assert alone["pytorch_optimizer PCGrad"]["memory"] > 5 and "left" not in alone["pytorch_optimizer PCGrad"]
    assert set(found["RMSprop"]) >= {"bound", "ogdopt, step tensor by tensor", "ogdopt, fused=True"}
    assert "projection, both gradients given" in capsys.readouterr().out


@pytest.mark.parametrize("name", projection.BASES)
def test_every_way_to_step_takes_the_same_step(name):
    """torch's own path, this library around torch's steps, and fused=True where there is one."""
    ends = {}
    labels = projection.steps(name, peers.Gradients("tiny"), "cpu")
    for label in labels:
        given = peers.Gradients("tiny")
        way = projection.steps(name, given, "cpu")[label]
        if isinstance(way, Timed) and "alone" not in label:
            before = given.flat["p"].clone()
            way.seconds(lambda: 0.0)
            ends[label] = given.flat["p"] - before
    assert len(ends) >= 2
    first, *others = ends.values()
    assert first.abs().max() > 0
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-2, atol=2e-9)


def test_a_bound_reads_and_writes_as_much_as_the_step():
    """Passes over memory: two for the inner product, then gradients, parameters and state, each read and written once."""
    state = {"SGD": 0, "RMSprop": 1, "Adam": 2, "AdamW": 2}
    for name, (additions, scalings, norms) in projection.PASSES.items():
        reads, writes = 2 * additions + scalings + norms, additions + scalings
        assert (reads, writes) == (3 + state[name], 1 + state[name]), name


def test_many_tensors(tmp_path, capsys):
    many_tensors.main(["--tiny", "--rounds", "1", "--output", str(tmp_path / "many.json")])
    found = results(tmp_path / "many.json")["20 x (8,)"]
    assert set(found) == set(many_tensors.BASES) and set(found["AdamW"]) == set(many_tensors.WAYS)
    assert all(entry["ratio"] > 0 and entry["microseconds a tensor"] > 0 for ways in found.values() for entry in ways.values())
    assert "over clipping and step" in capsys.readouterr().out


# ---- whole steps -------------------------------------------------------------------------------------------------------


def test_step(tmp_path):
    step.main(
        ["--size", "tiny", "--sequences", "1", "--tokens", "16", "--rounds", "1", "--output", str(tmp_path / "SIZE_TOKENS")]
    )
    found = results(tmp_path / "tiny_16")
    assert all(entry["ratio"] > 0 for entry in found.values() if isinstance(entry, dict))
    assert {"both losses in one graph", "ogdopt", "pytorch_optimizer PCGrad"} <= set(found)


def test_ways_that_are_the_same_step():
    """This library's but for the one tensor by tensor, up to rounding, and TorchJD's up to its regularization."""
    ends = {}
    for name in step.ways(common.mistral("tiny"), *common.sides(common.mistral("tiny"), 1, 16)):
        model = common.mistral("tiny")
        way = step.ways(model, *common.sides(model, 1, 16))[name]
        if not isinstance(way, str):
            way()
            ends[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = torch.cat([p.detach().flatten() for p in common.mistral("tiny").parameters()])
    expected = ends["ogdopt"] - start
    for name in ends:
        likeness = torch.nn.functional.cosine_similarity(ends[name] - start, expected, dim=0)
        same = name.startswith("TorchJD") or (name.startswith("ogdopt") and "tensor" not in name)
        assert likeness > (0.99 if "int8" not in name else 0.95) if same else likeness < 0.95, name


@pytest.mark.parametrize("mode", set_aside.MODES)
def test_set_aside(mode, capsys, monkeypatch):
    for name, value in common.MEMORY.items():
        monkeypatch.setenv(name, value)  # so that it may; the peak is not judged here
    if mode in set_aside.OTHERS and not HERE[mode]:
        pytest.skip(str(common.absent(mode)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fused=True")  # else another way would be measured
        set_aside.main(["--mode", mode, "--size", "tiny", "--rounds", "1"])
    found = json.loads(capsys.readouterr().out)
    assert found["ratio"] > 0 and found["parameters"] == 24_992
    if mode in set_aside.OURS:
        assert abs(found["left"]) < {"int8": 1e-2, "fused_bfloat16": 1e-3, "bfloat16": 1e-3}.get(mode, 1e-5)


def test_set_aside_stands_beside_the_plain_step(monkeypatch, tmp_path, capsys):
    peaks = {"graph": (1.5, 1.75), "none": (2.0, 2.5)}

    def child(_, __, mode, *words, environment):
        assert environment == common.MEMORY and "tiny" in words
        return json.dumps(dict(zip(("peak", "peak_many"), peaks[mode])) | {"ratio": 1.0, "least": 1.0, "most": 1.0})

    monkeypatch.setattr(common, "child", child)
    set_aside.main(["--size", "tiny", "--modes", "none", "--output", str(tmp_path / "SIZE.json")])
    assert "+0.50" in (said := capsys.readouterr().out) and "+0.75" in said
    found = results(tmp_path / "tiny.json")
    assert {name: (entry["peak"], entry["peak_many"]) for name, entry in found.items()} == peaks


@pytest.mark.skipif(not HERE["trl"], reason="TRL is not installed")
def test_trainers(capsys):
    """Both train on the same tokens, and each step of TRL's has ours behind it."""
    found = trainers.measure("tiny", 4, 0.1, 2, False, rounds=1)
    assert found["ogdopt, OGD"].keys() >= set(trainers.TRL) and found["ogdopt, OGD"]["on the fly"]["ratio"] > 0
    lines = trainers.texts(4, 0.1, "tiny", False)
    words = [(row["prompt"] + row[side]).split() for row in lines for side in ("chosen", "rejected")]
    assert found["batch"]["tokens"] == sum(len(text) + 1 for text in words)  # one more ends each
    sizes = "--size tiny --pairs 4 --scale 0.1 --micro 2 --memory ogd".split()
    needed = json.loads(common.child("trainers.py", *sizes, environment=common.MEMORY).splitlines()[-1])
    assert needed["process"] > needed["over start"] > 0
    for name in found:
        found[name] |= needed
    trainers.report(found, "tiny")
    assert "1.00x" in capsys.readouterr().out


def test_pairs_are_sorted_unless_they_are_to_be_shuffled():
    def longest(rows):
        return [max(len((row["prompt"] + row[side]).split()) for side in ("chosen", "rejected")) for row in rows]

    by_length, any_order = (longest(trainers.texts(16, 1.0, "tiny", shuffled)) for shuffled in (False, True))
    assert by_length == sorted(any_order, reverse=True) != any_order


# ---- the others --------------------------------------------------------------------------------------------------------


def test_growth(tmp_path):
    words = "--sizes tiny miniature --tokens 16 32 --micros 1 2 --ranks 2 --rounds 1".split()
    growth.main([*words, "--output", str(tmp_path / "growth.json")])
    found = results(tmp_path / "growth.json")
    assert [len(found[axis]) for axis in growth.AXES] == [2, 2, 2, 1]
    assert all(found["ranks"][0][part] > 0 for part in (*growth.PARTS, *growth.COLLECTIVES))
    assert "<svg" in (tmp_path / "growth.svg").read_text()


def test_exponents_and_crossings_are_those_of_a_law():
    """Forward and backward 2 ns a parameter and token, projection 3 ns a parameter, the step 5: as long at 4 tokens."""
    points = [
        {"x": P, "forward and backward": 2e-9 * P * 100, "Gram": 1e-9 * P, "mixture": 2e-9 * P, "base step": 5e-9 * P**2 / 1e6}
        for P in (1e6, 4e6)
    ]
    slopes = growth.exponents([*points, {"x": 9e6} | dict.fromkeys(growth.PARTS, 0.0)])  # what is not there is left out
    assert [slopes[part] for part in growth.PARTS] == pytest.approx([1, 1, 1, 2])
    ranks = [{"x": n, "collectives": n - 1.0} | dict.fromkeys(growth.PARTS, 0.5) for n in (1, 2, 4)]
    found = growth.crossings({"parameters": points, "ranks": ranks}, 100)
    assert found["1M: longer than Gram and mixture"] == pytest.approx(1.5)
    assert found["1M: longer than these and the base step"] == pytest.approx(4)
    assert found["1M: projection under 0.5%"] == pytest.approx((3 / 0.005 - 8) / 2)
    assert found["ranks: collectives longer than the rest"] == 4


@pytest.mark.parametrize("way", gpu.WAYS)
def test_gpu_steps_at_a_shrunken_shape(way):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fused=True")  # else another way would be measured
        found = gpu.measure(way, 1, 32, 1, True, "cpu")
    assert found["seconds"] > 0 and found["tokens"] == 64 and found["predicted"] > 0
    # 2 sequences of 32 tokens: 6 an element of two layers and token, of the head for 24 of them, and causal attention
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    assert found["flops"] == 2 * 6 * (2 * layer * 32 + 500 * 64 * 24 + 2 * 64 * 32**2)
    assert ("projection" in found) == (way in ("ogd", "ogd_bfloat16"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_seven_billion_parameters_want_a_gpu():
    with pytest.raises(SystemExit, match=r"found no CUDA device.*--tiny"):
        gpu.main([])


def test_profiled(tmp_path):
    profiled.main(["--sizes", "tiny", "--trace", str(tmp_path), "--output", str(tmp_path / "profile.json")])
    parts = results(tmp_path / "profile.json")["tiny"]["parts"]
    assert set(parts) == {"forward", "backward", "projection and clipping", "base step"} and min(parts.values()) > 0
    assert (tmp_path / "tiny.json").stat().st_size > 1000


def test_objectives_and_tax_noise(tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "STEPS", 2)
    monkeypatch.setattr(objectives, "TOKENS", 8)
    objectives.main(["--rounds", "1", "--output", str(tmp_path / "objectives.json")])
    assert set(results(tmp_path / "objectives.json")) == set(objectives.SCHEDULES)
    tax_noise.main(["--repetitions", "1", "--output", str(tmp_path / "tax.json")])
    assert set(results(tmp_path / "tax.json")) == set(tax_noise.TRUTHS)


# ---- one table ---------------------------------------------------------------------------------------------------------


def names():
    """What each benchmark calls its entries, column by column of `bench.ROWS`."""
    model = common.mistral("tiny")
    given = peers.Gradients("tiny")
    whole = {"both losses in one graph", *step.ways(model, *common.sides(model, 1, 8))}
    alone, together = {"bound", *peers.ways(given)}, {"bound", *projection.steps("RMSprop", given, "cpu")}
    return [
        alone,
        together,
        whole,
        set(set_aside.MODES),
        {*trainers.OURS.values(), *(f"TRL, reference {x}" for x in trainers.TRL)},
    ]


def test_every_cell_of_the_table_is_measured():
    """A name that no benchmark knows would show as a dash for ever."""
    assert {"none", "fused", "sum"} < set(bench.RUNS["set_aside.py"]) <= set(set_aside.MODES) | {"--rounds", "1", "--modes"}
    for row, keys in bench.ROWS.items():
        for key, known in zip(keys, names(), strict=True):
            assert not key or key in known, (row, key)


def test_the_table_of_what_was_found():
    entry = {"ratio": 1.25, "left": -2e-9, "seconds": 3.0}
    alone, together, whole, _, _ = names()
    found = {
        "projection.py": {"alone": dict.fromkeys(alone, entry), "RMSprop": dict.fromkeys(together, entry)},
        "step.py": dict.fromkeys(whole, entry) | {"pytorch_optimizer PCGrad": "pytorch_optimizer is not installed"},
        "set_aside.py": {"graph": {"peak_many": 1.5}, "none": {"peak_many": 1.75}},
        "trainers.py": {
            "TRL, reference on the fly": {"seconds": 8.0, "over start": 100},
            "ogdopt, OGD": {"seconds": 3.5, "over start": 50, "on the fly": {"ratio": 0.4}},
        },
    }
    looked_up = bench.tables(found)
    assert bench.cells("ogdopt", looked_up) == ["1.25", "-2e-09", "1.25", "1.25", "+0.25", "0.40", "0.50"]
    assert bench.cells("pytorch_optimizer PCGrad", looked_up)[3] == bench.MISSING
    assert bench.gaps(looked_up) == ["missing: pytorch_optimizer PCGrad: pytorch_optimizer is not installed"]


def test_what_found_no_time_is_named(tmp_path, capsys):
    bench.main(["--seconds", "0", "--size", "tiny", "--output", str(tmp_path / "bench.json")])
    assert set(results(tmp_path / "bench.json").values()) == {"no time left of 0 s"}
    assert "TRL DPOTrainer, reference precomputed: no time left of 0 s" in " ".join(capsys.readouterr().out.split())


# ---- peers that are missing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gone", "peer"), [("trl", "trl"), ("quadprog", "torchjd"), ("torchjd", "torchjd")])
def test_a_peer_that_lacks_something_is_missing(gone, peer, monkeypatch):
    monkeypatch.setattr(common, "installed", lambda name: None if name == gone else "1.0")
    assert common.absent(peer) == f"{gone} is not installed"
    assert common.absent("pytorch_optimizer") is None


def test_missing_peers_are_named(monkeypatch, tmp_path, capsys):
    """Each way of theirs by what is missing, in the table and in the record; the others are measured as ever."""
    monkeypatch.setattr(common, "installed", lambda name: None if name in common.PEERS else "1.0")
    monkeypatch.setattr(common, "record", lambda path, found, **_: path.write_text(json.dumps(found)))
    step.main(["--size", "tiny", "--sequences", "1", "--tokens", "8", "--rounds", "1", "--output", str(tmp_path / "step")])
    found = json.loads((tmp_path / "step").read_text()) | peers.ways(peers.Gradients("tiny"))
    for name, way in found.items():
        package = name.partition(" ")[0].lower()
        assert (way == f"{package} is not installed") == (package in common.PEERS), name
    assert sum(name.startswith("TorchJD") for name in found) == 4
    said = capsys.readouterr().out
    assert "torchjd is not installed" in said and "pip install -c constraints.txt '.[bench]'" in said


def test_without_trl_the_trainers_say_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(common, "installed", lambda name: None if name == "trl" else "1.0")
    trainers.main(["--size", "tiny", "--output", str(tmp_path / "SIZE.json")])
    found = json.loads((tmp_path / "tiny.json").read_text())["results"]
    assert set(found.values()) == {"trl is not installed"}
    assert bench.tables({"projection.py": "x", "step.py": "x", "set_aside.py": "x", "trainers.py": found})[-1] == found
    assert "comes with pip install -c constraints.txt '.[bench]'" in capsys.readouterr().out


def test_the_peers_are_those_of_the_extra():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")
    extra = tomllib.loads((common.ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["bench"]
    assert {word.split("[")[0].split(">")[0] for word in extra} == set(common.PEERS)


def test_scaling(tmp_path):
    """One process and two: what they wait is measured, and one waits for nobody."""
    out = tmp_path / "scaling.json"
    words = ["--ranks", "1,2", "--steps", "2", "--output", str(out)]
    subprocess.run([sys.executable, "-m", "benchmarks.scaling", *words], cwd=common.ROOT, check=True, timeout=limits.PROCESS)
    found = results(out)
    for kind in ("strong", "weak"):
        assert found["1"][kind]["waiting"] == 0 and found["1"][kind]["efficiency"] == 1
        assert 0 < found["2"][kind]["waiting"] < 1 and found["2"][kind]["cpu_seconds"] > 0
