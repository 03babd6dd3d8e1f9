"""The OGD paper's run: its table's arithmetic, its recipes in every line, and one of them end to end, shrunken."""

import json
from pathlib import Path

import pytest

from ogdopt_harness import cli
from ogdopt_harness.analysis.paper import BASELINE, TABLE_1, TITLE, comparable, reduction
from ogdopt_harness.analysis.tax import Interval, tax
from ogdopt_harness.commands.usage import parse
from ogdopt_harness.config.recipes import RECIPES
from tests.hub import EIGHT, lay_out_eight

MAGPIE = Path(__file__).parents[2] / "shared/data/hub_format/Magpie-Align__Magpie-Llama-3.1-Pro-DPO-100K-v0.1.jsonl"
PAPERS = ["mistral_7b_magpie_pro", "mistral_7b_magpie_air_gemma2"]


def test_the_papers_headline_figures_follow_from_its_table():
    """99.15% is Magpie-Pro alone. 92.82% is the mean of both data sets' reductions, each method at its *best* epoch.

    The paper calls the second an average at epoch 5. That is OGD's best epoch in both; DPO's is 4 and 1, and its TAX at epoch 5
    is drawn but not printed, so that an average at epoch 5 of both cannot be recomputed.
    """
    pro, air = (reduction(TABLE_1[name]) for name in ("magpie_pro", "magpie_air_gemma2"))
    assert f"{pro:.2%}" == "99.15%" and f"{air:.2%}" == "86.49%"
    assert f"{(pro + air) / 2:.2%}" == "92.82%"
    assert [TABLE_1[name]["ogd"].epoch for name in TABLE_1] == [5, 5]
    assert [TABLE_1[name][BASELINE].epoch for name in TABLE_1] == [4, 1]


def test_the_table_is_plausible_by_its_own_definitions():
    """Every estimate lies in its interval, every TAX in TAX's range; OGD's is the mildest."""
    for rows in TABLE_1.values():
        for row in rows.values():
            assert row.arena_hard.low < row.arena_hard.value < row.arena_hard.high
            assert row.wildbench.low < row.wildbench.value < row.wildbench.high
            assert -100 <= row.tax <= 0 and 1 <= row.epoch <= 5
        assert max(rows, key=lambda name: rows[name].tax) == "ogd"
    # OGD's figure on Magpie-Pro is one of eight accuracies lower by 1.3%, or each by 0.16%: a few items.
    assert tax([0.8] * 8, [0.8] * 7 + [0.8 * (1 - 0.0131)]) == pytest.approx(-0.1638, abs=2e-4)


def test_comparable_as_the_paper_defines_it():
    """Better, or overlapping intervals: by that OGD's Arena-Hard is comparable to all of DPO's but one of eight."""
    assert comparable(Interval(5, 4, 6), Interval(4, 1, 3)) and comparable(Interval(5, 4, 6), Interval(9, 6, 12))
    assert not comparable(Interval(5, 4, 6), Interval(9, 6.5, 12))
    not_comparable = [
        (data, name)
        for data, rows in TABLE_1.items()
        for name in rows
        if not comparable(rows["ogd"].arena_hard, rows[name].arena_hard)
    ]
    assert not_comparable == [("magpie_air_gemma2", "dpo_beta0.05")]
    assert all(comparable(rows["ogd"].wildbench, row.wildbench) for rows in TABLE_1.values() for row in rows.values())


@pytest.mark.parametrize("name", PAPERS)
def test_the_recipes_are_appendix_a2(name):
    """Line by line, defaults included (SPEC 1.4)."""
    config = parse(["--config", str(RECIPES / f"{name}.yaml")])
    assert config.model.model_name_or_path == "mistralai/Mistral-7B-v0.3" and config.model.bf16
    assert config.model.tokenizer_name_or_path == "mistralai/Mistral-7B-Instruct-v0.3"
    assert config.model.dtype == "float32"  # master weights
    hub = {"pro": "Magpie-Align/Magpie-Llama-3.1-Pro-DPO-100K-v0.1", "gemma2": "yjwon/Magpie-Air-Gemma2-DPO-100K"}
    for stage in (config.sft, config.preference):
        assert stage.data.train == [hub[name.rpartition("_")[2]]]
        assert (stage.data.max_prompt_length, stage.data.max_length) == (2048, 4096)
        assert stage.lr_scheduler_type == "constant_with_warmup" and stage.optimizer_args == {}  # torch's: no weight decay
    sft, preference = config.sft, config.preference
    assert (sft.num_train_epochs, sft.train_batch_size, sft.optimizer, sft.learning_rate) == (1, 256, "Adam", 5e-6)
    assert (sft.warmup_ratio, sft.train_on_prompt, sft.seed) == (0.1, True, 0)
    assert sft.data.columns == {"messages": "chosen"}
    assert (preference.num_train_epochs, preference.train_batch_size) == (5, 64)
    assert (preference.optimizer, preference.learning_rate) == ("RMSprop", 1e-6)
    assert (preference.warmup_steps, preference.warmup_ratio) == (150, None)
    assert (preference.train_on_prompt, preference.seed) == (False, 1)
    assert config.methods == ["dpo", "ogd"] and preference.beta == [0.2, 0.1, 0.05, 0.02]
    assert config.evals.lm_eval_tasks == EIGHT and config.evals.apply_chat_template and config.evals.limit is None
    assert config.report.paper == name.removeprefix("mistral_7b_") and config.report.paper in TABLE_1


@pytest.mark.parametrize("name", PAPERS)
def test_the_recipes_pass_the_dry_run_offline(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.answer(["run", "--config", name, "--dry_run", "--world_size", "8"]) == 0
    out = capsys.readouterr().out
    assert "7,248,023,552 parameters" in out and "nothing was written" in out and not list(tmp_path.iterdir())


TINY = {
    "model_type": "mistral",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_recipe_end_to_end_with_the_best_epoch_chosen_by_a_judge(tmp_path, monkeypatch, capsys):
    """The same recipe with a tiny architecture and local files; then answers, judgements, and the report again (A.2)."""
    pytest.importorskip("openai")
    if not MAGPIE.is_file():
        pytest.skip(f"no {MAGPIE}")
    from ogdopt_harness.commands.generate import generate
    from ogdopt_harness.commands.judge import judge
    from ogdopt_harness.config.commands import GenerateConfig, JudgeConfig
    from tests.hub import write_rows
    from tests.stub_server import serving

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    lay_out_eight(tmp_path / "hub", n=6, subjects=1)
    words = ["run", "--config", "mistral_7b_magpie_pro", "--study.output_dir", "out"]
    words += ["--model.model_name_or_path=null", f"--model.architecture={json.dumps(TINY)}", "--model.vocab_size=600"]
    words += ["--model.tokenizer_name_or_path=null", "--model.gradient_checkpointing=false", "--device=cpu", "--threads=1"]
    for stage in ("sft", "preference"):
        words += [f"--{stage}.data.train=[{MAGPIE}]", f"--{stage}.data.eval=[{MAGPIE}]", f"--{stage}.train_batch_size=4"]
        words += [f"--{stage}.data.max_length=256", f"--{stage}.data.max_prompt_length=128"]
        words += [f"--{stage}.data.on_long_row=truncate"]
    words += ["--preference.num_train_epochs=2", "--preference.beta=0.1", "--report.samples=200"]
    words += ["--evals.lm_eval_tasks=piqa,boolq", "--evals.lm_eval_data=hub", "--evals.limit=6"]
    assert cli.answer(words) == 0, capsys.readouterr().err
    report = (tmp_path / "out" / "report.md").read_text()
    assert TITLE in report and "−0.1638%" in report and "−19.2612%" in report and "99.15%" in report
    assert "At matched preference learning (held-out preference accuracy" in report

    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "where is it ?"}, {"prompt": "say something kind"}])
    seed = tmp_path / "out" / "seed-0"
    options = dict(max_new_tokens=4, device="cpu")
    generate(str(seed / "supervised/model/epoch-1"), prompts, GenerateConfig(output_dir="baseline", **options))
    for name in ("dpo_beta0.1", "ogd"):
        for epoch in (1, 2):
            where = seed / name / "answers" / f"epoch-{epoch}"
            model = str(seed / name / "model" / f"epoch-{epoch}")
            generate(model, prompts, GenerateConfig(output_dir=str(where), **options))
            row = json.loads((where / "answers.jsonl").read_text().splitlines()[0])
            (where / "answers.jsonl").write_text(  # replies of so small a model are all alike
                "".join(
                    json.dumps({**row, "messages": [{"role": "user", "content": text}], "output": f"{name} {epoch}"}) + "\n"
                    for text in ("where is it ?", "say something kind")
                )
            )

    def first_epoch_wins(messages):
        _, _, rest = messages[1]["content"].partition("<|answer A|>")
        a, _, b = rest.partition("<|answer B|>")
        good = [("ogd 1" in text) + ("dpo_beta0.1 2" in text) for text in (a, b)]
        return "[[A>B]]" if good[0] > good[1] else "[[B>A]]" if good[1] > good[0] else "[[A=B]]"

    with serving(first_epoch_wins) as server:
        answers = [seed / name / "answers" / f"epoch-{n}" for name in ("dpo_beta0.1", "ogd") for n in (1, 2)]
        judge(Path("baseline"), answers, JudgeConfig(base_url=server.url, cache="judged.jsonl"))
    assert cli.answer(words) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["criterion"] == "judged win rate"
    assert results["runs"]["ogd"]["best"]["epoch"] == [1] and results["runs"]["dpo_beta0.1"]["best"]["epoch"] == [2]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "By our judge's win rate, OGD is comparable (better, or overlapping 95% intervals) to DPO β=0.1." in report
    assert "win rate, own judge" in report
