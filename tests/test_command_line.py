"""The command line: what --help costs and shows, what is said of mistakes, and which configuration words stand for."""

import json
import os
import subprocess
import sys

import pytest

from ogdopt_harness import cli
from ogdopt_harness.commands.usage import MINIATURE_NOTE, OWN_NOTE, USAGES, asked, parse, toys
from ogdopt_harness.config.commands import SentimentConfig
from ogdopt_harness.config.options import find, nearest, section
from ogdopt_harness.config.recipes import launch_files, recipes
from ogdopt_harness.config.schema import Config
from tests.test_report import write_study

HELP = [[], *([name] for name in USAGES), *(["study", name] for name in toys()), ["run", "--help", "preference"]]


def ended(*words, **environment):
    """The command in a process of its own, in 80 columns."""
    names = os.environ | {"COLUMNS": "80"} | environment
    return subprocess.run(
        [sys.executable, "-m", "ogdopt_harness", *words], capture_output=True, text=True, timeout=120, env=names
    )


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_help_loads_no_torch_and_fits_a_terminal(words):
    """Without torch, transformers and matplotlib a page takes 0.2 CPU seconds; with them it took up to 5."""
    words = words if "--help" in words else [*words, "--help"]
    code = f"import sys; from ogdopt_harness import cli; cli.command({words!r})"
    code += "; assert not {'torch', 'transformers', 'matplotlib'} & sys.modules.keys()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ | {"COLUMNS": "80"}
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 60 or "preference" in words
    assert (max(map(len, lines)) <= 82 and "usage: ogdopt" in lines[0]) or "preference" in words


def test_help_names_every_command_and_every_section():
    front = ended("--help").stdout
    assert all(f"  {name} " in front for name in USAGES) and ended().stdout == front
    page = ended("run", "--help").stdout
    assert all(f"  {part.name} " in page for part in section(Config).sections)
    everything = ended("run", "--help", "all").stdout
    assert all(f"--{option.name}" in everything.split() for option in section(Config).every())
    assert "learning_rate" in ended("run", "--help", "learning_rate").stdout


def test_every_option_says_what_it_is_for_or_is_named_so():
    """Also those that the preference stage has from its base class."""
    (part,) = (part for part in section(Config).walk() if part.name == "preference")
    said = {option.name: option.help for option in part.options}
    assert "Effective batch" in said["preference.train_batch_size"] and "Strengths" in said["preference.beta"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["studdy"], "there is no command 'studdy'; did you mean study?"),
        (["--confg", "miniature"], "--confg: there is no such option; did you mean --config?"),
        (["run", "--preference.lr", "1"], "--preference.lr: there is no such option; did you mean --preference.learning_rate?"),
        (["run", "--learning-rate=1"], "did you mean --sft.learning_rate or --preference.learning_rate?"),
        (["run", "--preference.learning", "1"], "did you mean --preference.learning_rate?"),
        (["run", "--world.peeple", "1"], "--world.peeple: there is no such option; did you mean --world.people"),
        (["run", "--model.lora.rank", "1"], "--model.lora.rank: there is no such option"),
        (["run", "--preference.learning_rate", "abc"], "--preference.learning_rate is abc; expected a number"),
        (["run", "--sft.optimizer", "Adm"], "--sft.optimizer is Adm; expected one of RMSprop, Adam, AdamW, SGD"),
        (["run", "--threads", "many"], "--threads is many; expected an integer or null"),
        (["run", "--world", "3"], "--world is 3; expected a mapping of its options, or a YAML file"),
        (["run", "--model.lora.r", "0"], "model.lora.r is 0; expected 1 or more"),
        (["run", "--methods"], "--methods is given without a value; expected a list"),
        (["run", "--methods", "sft", "dpo"], "'dpo' stands where no word is expected: --methods takes one value"),
        (["run", "stray"], "'stray' stands where no word is expected"),
        (["run", "-x"], "-x: there is no such option"),
        (["run", "--config", "miniatur"], "there is no such recipe or YAML file; did you mean miniature?"),
        (["run", "--study", "gone.yaml"], "--study: there is no YAML file gone.yaml"),
        (["run", "--help", "preferense"], "no section or option is called so; did you mean preference"),
        (["generate"], "MODEL is missing: Hugging Face folder or hub id"),
        (["generate", "m", "p"], "--output_dir is missing: Folder of answers.jsonl"),
        (["generate", "m", "p", "--format", "arena", "--output_dir", "x"], "--format is arena; expected one of arena_hard,"),
        (["tax", "m"], "MODEL is missing"),
        (["tax", "m", "n", "--preference.beta", "1"], "--preference.beta: tax has no use for it; take it out"),
        (["study", "dynamic"], "there is no study 'dynamic'; did you mean dynamics?"),
        (["study", "tradeoff", "--data_dir", "x"], "--data_dir: there is no such option"),
        (["report", "nowhere"], "nowhere is no study's folder"),
        (["recipes", "slum.sh"], "there is no recipe or launch file 'slum.sh'; did you mean slurm.sh"),
        (["completion", "fsh"], "there is no script for 'fsh'; expected one of bash, zsh, fish, tcsh"),
    ],
)
def test_a_mistake_is_answered_in_four_lines_with_status_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.answer(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and len(said.splitlines()) <= 4
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sft: {learning_rat: 3}", "mine.yaml:1: there is no option sft.learning_rat; expected learning_rate"),
        ("nonsense: 4", "mine.yaml:1: there is no option nonsense"),
        ("model: {lora: {rr: 3}}", "mine.yaml:1: there is no option model.lora.rr; expected r"),
        ("evals: {tasks: [{nam: x}]}", "mine.yaml: evals.tasks.nam: there is no such option; did you mean evals.tasks.name"),
        ("sft: {seed: abc}", "mine.yaml: sft.seed is abc; expected an integer"),
        ("sft: {seed: [", "mine.yaml:1: not YAML"),
    ],
)
def test_a_mistake_in_a_recipe_names_the_file(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(text)
    assert cli.answer(["run", "--config", "mine.yaml", "--methods", "ogd"]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_without_a_recipe_it_is_the_miniature_study_and_says_so(tmp_path, monkeypatch, capsys):
    found, _ = asked("run", [])
    assert found.config == parse(["--config", "miniature"]) and found.note == MINIATURE_NOTE
    assert asked("run", ["--config", "miniature"])[0].note == ""
    assert asked("run", ["--study.seeds", "0,1", "--world.people", "16"])[0].config.model.architecture["hidden_size"] == 128
    monkeypatch.chdir(tmp_path)
    small = "--dry_run --world.people 16 --world.sft_conversations 1000 --world.preference_pairs 64 --world.items 8".split()
    assert cli.answer(["run", *small]) == 0
    assert capsys.readouterr().out.startswith("No --config: this is the miniature study (ogdopt run --config miniature).")


@pytest.mark.parametrize(
    "words",
    [
        ["--model.model_name_or_path", "mine"],
        ["--preference.data.train", "rows.jsonl"],
        ["--preference.data.columns.chosen", "good"],
        ["--data_dir", "mine"],
    ],
)
def test_a_model_or_data_without_a_recipe_start_from_the_defaults(words):
    """No world, no benchmarks of one, no tokenizer of one, none of the miniature study's rates and sizes."""
    found, _ = asked("run", [*words, "--methods", "ogd"])
    config, defaults = found.config, Config()
    assert found.note == OWN_NOTE and config.world is None and config.evals == defaults.evals and config.sft == defaults.sft
    assert config.preference.learning_rate == defaults.preference.learning_rate and not config.model.architecture
    assert config.device == "auto" and config.threads is None and config.methods == ["ogd"]
    assert config.model.words == config.model.model_name_or_path  # the model's own


def test_spellings_of_the_same_options():
    one = parse(["--methods", "ogd,dpo", "--sft.fused", "--study.output_dir", "x", "--model.train_only", "lm_head"])
    two = parse(["--methods=[ogd, dpo]", "--sft.fused=true", "--study.output-dir=x", "--model.train_only=[lm_head]"])
    assert one == two and one.sft.fused and one.methods == ["ogd", "dpo"]
    assert parse(["--methods+", "ogd"]).methods == [*parse([]).methods, "ogd"]
    assert parse(["--model.lora.r", "4", "--joint.stop_gap=null"]).model.lora.r == 4


def test_options_override_a_recipe_wherever_they_stand():
    recipe, option = ["--config", "tradeoff"], ["--methods", "ogd"]
    assert parse(recipe + option).methods == parse(option + recipe).methods == ["ogd"]


def test_nearest_names():
    names = [option.name for option in section(Config).every()]
    for wrong, right in {
        "preference.epochs": "preference.num_train_epochs",
        "sft.batch_size": "sft.train_batch_size",
        "model.name": "model.model_name_or_path",
        "study.seed": "study.seeds",
        "preference.betta": "preference.beta",
        "metods": "methods",
    }.items():
        assert right in nearest(wrong, names), wrong
    assert nearest("xyzzy", names) == []
    assert find("model.architecture.hidden_size", section(Config)).name == "model.architecture" and not find(
        "mode", section(Config)
    )


def test_print_config_is_read_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = ended("run", "--config", "tradeoff", "--print_config")
    assert done.returncode == 0
    (tmp_path / "again.yaml").write_text(done.stdout)
    assert parse(["--config", "again.yaml"]) == parse(["--config", "tradeoff"])


def test_version():
    assert ended("--version").stdout.startswith("ogdopt ")


def test_recipes_and_launch_files_are_found_by_name(capsys):
    cli.command(["recipes"])
    said = capsys.readouterr().out
    assert all(f"  {name}\n" in said or f"  {name} " in said for name in [*recipes(), *launch_files()])
    for name, path in (recipes() | launch_files()).items():
        cli.command(["recipes", name])
        assert capsys.readouterr().out.strip() == str(path) and path.is_file()


def test_bash_completes_commands_and_options(tmp_path):
    """The script in a bash of its own, asked as TAB asks it."""
    pytest.importorskip("shtab")
    script = tmp_path / "completion"
    script.write_text(ended("completion", "bash").stdout)
    ask = """source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); complete -p ogdopt > /dev/null
    function=$(complete -p ogdopt | sed 's/.*-F \\([^ ]*\\).*/\\1/'); $function ogdopt "${COMP_WORDS[COMP_CWORD]}" ""
    printf '%s\\n' "${COMPREPLY[@]}" """

    def completed(*words):
        done = subprocess.run(["bash", "-c", ask, "-", script, "ogdopt", *words], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return set(done.stdout.split())

    assert completed("sep") == {"separation"} and {"run", "tax", "study"} <= completed("")
    assert completed("run", "--preference.be") == {"--preference.beta"}
    assert "miniature" in completed("run", "--config", "mini")
    assert completed("study", "three") == {"three_d"}


def test_a_report_is_made_again_without_torch(tmp_path):
    write_study(tmp_path / "mine", seeds=(0,), epochs=1)
    done = ended("report", str(tmp_path / "mine"), "--samples", "50", "--confidence", "0.9")
    assert done.returncode == 0, done.stderr
    assert "Report: " in done.stdout and (tmp_path / "mine" / "report.html").is_file()
    assert json.loads((tmp_path / "mine" / "results.json").read_text())["confidence"] == 0.9
    code = f"import sys; from ogdopt_harness import cli; cli.command(['report', {str(tmp_path / 'mine')!r}])"
    code += "; assert not {'torch', 'transformers'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0


def test_the_styles_of_the_command_are_those_of_the_experiment():
    from ogdopt_harness.studies.sentiment_lab import STYLES

    option = find("style", section(SentimentConfig))
    assert option.metavar == "{" + ",".join(STYLES) + "}"


def test_a_reader_that_leaves_early_is_no_fault():
    done = subprocess.run(
        f"{sys.executable} -m ogdopt_harness recipes | head -1", shell=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("recipes") and "Traceback" not in done.stderr
