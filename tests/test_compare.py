"""`ogdopt tax`: what it says of models whose outcomes are known, above all where that is: nothing."""

import json

import numpy as np
import pytest

from ogdopt_harness.cli import command
from ogdopt_harness.commands.tax import subjects
from ogdopt_harness.common.run_folder import short_name

# The paper's benchmarks at their real sizes, with plausible accuracies of a 7B model (chance).
SIZES = {
    "piqa": (1838, 0.82, 0.5),
    "social_iqa": (1954, 0.53, 0.33),
    "hellaswag": (10042, 0.81, 0.25),
    "arc_easy": (2376, 0.80, 0.25),
    "arc_challenge": (1172, 0.55, 0.25),
    "mmlu": (14042, 0.58, 0.25),
    "gsm8k": (1319, 0.40, 0.0),
    "boolq": (3270, 0.83, 0.5),
}


def outcomes(rng, base=None, flips=0.0, loss=0.0):
    """Right and wrong on every item; of `base`, a share of the items flipped by chance, and a share of the right ones lost."""
    found = {}
    for task, (n, p, _) in SIZES.items():
        right = rng.random(n) < p if base is None else base[task].copy()
        if base is not None:
            gone = rng.binomial(round(flips * n), 0.5)  # each flip as likely a loss as a gain
            for side, size in ((True, gone), (False, round(flips * n) - gone)):
                right[rng.choice(np.flatnonzero(base[task] == side), size, replace=False)] ^= True
            lost = np.flatnonzero(right)
            right[rng.choice(lost, round(loss * len(lost)), replace=False)] = False
        found[task] = right
    return found


def write(path, found, settings=None, tasks=None):
    ways = {
        task: {
            "family": "",
            "ways": {
                "direct": {
                    "metric": "acc",
                    "chance": SIZES[task][2],
                    "outcomes": right.astype(int).tolist(),
                    "doc_hashes": [f"{task}{i}" for i in range(len(right))],
                }
            },
        }
        for task, right in found.items()
        if tasks is None or task in tasks
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"model": path.stem, "settings": settings or {"limit": None}, "tasks": ways}))
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A reference, one that differs from it by chance alone, one that lost a fifth everywhere, and one that lost 2%."""
    folder, rng = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
    base = outcomes(rng)
    write(folder / "sft.json", base)
    write(folder / "equal.json", outcomes(rng, base, flips=0.05))
    write(folder / "lost.json", outcomes(rng, base, flips=0.05, loss=0.2))
    write(folder / "less.json", outcomes(rng, base, flips=0.05, loss=0.02))
    return folder


def told(models, out, capsys, *names):
    command(["tax", *(str(models / f"{name}.json") for name in names), "--study.output_dir", str(out)])
    printed = " ".join(capsys.readouterr().out.split())
    return printed, json.loads((out / "tax.json").read_text())


def test_an_equally_good_model_is_said_to_be_inside_the_noise_floor(models, tmp_path, capsys):
    printed, found = told(models, tmp_path, capsys, "sft", "equal", "lost")
    equal, lost = (found["tax"]["direct"][name] for name in ("equal", "lost"))
    assert -0.5 < equal["value"] < 0 and -0.5 < equal["null_mean"] < -0.1 and equal["p_value"] > 0.05
    assert "equal has a TAX of" in printed and "inside the noise floor: two equally good models score" in printed
    assert "No forgetting was detected, and no ratio to it means anything." in printed
    assert lost["value"] == pytest.approx(-20, abs=1) and "lost has a TAX of −20" in printed
    assert "it forgot more than chance explains" in printed
    assert equal["high"] == 0 and lost["low"] < lost["value"] < lost["high"] < -15
    assert "draws" not in equal and set(found["models"]) == {"sft", "equal", "lost"}
    assert (tmp_path / "tax.md").read_text().count("| mmlu |") == 1
    assert (tmp_path / "tax.md").read_text().count("| – | – |") == 1  # lost against equal: no ratio to noise


def test_a_ratio_is_given_to_a_model_that_clearly_forgot(models, tmp_path, capsys):
    _, found = told(models, tmp_path, capsys, "sft", "lost", "less", "equal")
    first, second = (line for line in (tmp_path / "tax.md").read_text().splitlines() if "forgot less" in line)
    assert first.startswith("| less | +1") and "9" in first.split("|")[4] and second.startswith("| equal | +1")
    assert "–" not in first.split("|")[4]
    signed = found["tax"]["direct"]["less"]
    assert signed["signed"] == pytest.approx(-2, abs=0.6) and 0 < signed["signed_se"] < 0.5


def test_a_benchmark_that_the_reference_cannot_do_is_left_out_and_named(tmp_path, capsys):
    rng = np.random.default_rng(1)
    base = outcomes(rng)
    base["gsm8k"][:] = False
    base["piqa"] = rng.random(len(base["piqa"])) < 0.5
    for name in ("sft", "tuned"):
        write(tmp_path / f"{name}.json", base)
    printed, found = told(tmp_path, tmp_path / "out", capsys, "sft", "tuned")
    assert "task 'gsm8k' (direct) was left out of TAX, since the reference answers no item of it" in found["warnings"]
    assert any("task 'piqa' (direct): the reference's accuracy" in w and "of chance (0.500)" in w for w in found["warnings"])
    assert len(found["tax"]["direct"]["tuned"]["tasks"]) == 7 and "left out of TAX" in printed


def test_other_settings_and_other_questions_are_named(models, tmp_path, capsys):
    rng = np.random.default_rng(2)
    other = write(tmp_path / "b.json", outcomes(rng), {"limit": 5})
    command(["tax", str(models / "sft.json"), other, "--study.output_dir", str(tmp_path / "o")])
    assert "b was evaluated with other settings than sft: limit is 5, not None" in capsys.readouterr().out.replace("\n", " ")
    few = write(tmp_path / "few.json", outcomes(rng), tasks=["piqa"])
    with pytest.raises(ValueError, match=r"task 'social_iqa' \(direct\) is in .*sft.json but not in .*few.json"):
        command(["tax", str(models / "sft.json"), few, "--study.output_dir", str(tmp_path / "o")])


def test_words_stand_for_runs_models_and_files(models, tmp_path):
    run = tmp_path / "seed-0" / "ogd"
    for epoch in (1, 2, 10):
        write(run / "evals" / f"epoch-{epoch}.json", {})
    (tmp_path / "model" / "epoch-3").mkdir(parents=True)
    (tmp_path / "model" / "epoch-3" / "config.json").write_text("{}")
    assert [s.name for s in subjects(str(run))] == ["ogd/epoch-1", "ogd/epoch-2", "ogd/epoch-10"]
    (model,) = subjects(str(tmp_path / "model" / "epoch-3"))
    assert model.model is not None and model.name.endswith("/epoch-3")
    assert subjects("mistralai/Mistral-7B-v0.3")[0].model is not None
    assert short_name(run / "evals" / "epoch-2.json") == "ogd/epoch-2"
    for wrong in (str(tmp_path), str(tmp_path / "gone"), "gone"):
        with pytest.raises(ValueError, match="is no Hugging Face folder"):
            subjects(wrong)
    sft = str(models / "sft.json")
    for words, message in [
        ([sft], "MODEL is missing"),
        ([sft, sft, "--dry_run"], "--dry_run: there is no such option"),
        ([sft, sft, "--sft.seed", "1"], "--sft.seed: tax has no use for it; take it out"),
        ([sft, sft], "sft is named twice"),
        ([], "REFERENCE is missing"),
    ]:
        with pytest.raises(ValueError, match=message):
            command(["tax", *words, "--study.output_dir", str(tmp_path)])
