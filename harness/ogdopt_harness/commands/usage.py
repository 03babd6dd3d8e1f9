"""All commands: what they are for, and what they take. Torch is not needed to know it."""

from __future__ import annotations

import ast
import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

from ogdopt_harness.config import commands
from ogdopt_harness.config.command_line import Given, Place, Usage, read, read_apart, split
from ogdopt_harness.config.help import rows
from ogdopt_harness.config.options import meant, nearest
from ogdopt_harness.config.recipes import DEFAULT_RECIPE, RECIPES, launch_files, recipes, title
from ogdopt_harness.config.schema import Config

FOLDER = Path(__file__).parent.parent / "studies"
OWN = ("model", "data_dir", "sft.data", "preference.data", "joint.data")
"""Options that say that a run is of the user's own model or data."""
TAX_SECTIONS = ("study", "model", "evals", "report", "data_dir", "device", "threads")
DIRECTORY = Place("directory", "folder of a study, e.g. runs/miniature")
USAGES = {
    usage.name: usage
    for usage in (
        Usage(
            "run",
            "A study: a supervised stage, methods of preference tuning, what each forgot, and a report. Without options it is "
            "the miniature study, minutes on a laptop.",
            Config,
            apart=commands.Launch,
            recipes=True,
            examples=(
                "ogdopt run",
                "ogdopt run --config miniature --study.seeds 0,1,2",
                "ogdopt run --model.model_name_or_path FOLDER \\",
                "    --preference.data.train pairs.jsonl --dry_run",
                "ogdopt run --help preference",
            ),
        ),
        Usage(
            "tax",
            "What models forgot against the first of them: accuracy on benchmarks, and TAX. Without --config the paper's eight "
            "benchmarks are asked.",
            Config,
            (
                Place("reference", "a Hugging Face folder, a hub id, a run's folder, or the file of an evaluation"),
                Place("model", "the same, one or more; of a run every evaluated epoch takes part", many=True),
            ),
            recipes=True,
            sections=TAX_SECTIONS,
            examples=("ogdopt tax runs/mine/seed-0/supervised runs/mine/seed-0/ogd",),
        ),
        Usage(
            "generate",
            "A model's greedy answers to prompts, in the files that AlpacaEval, Arena-Hard, WildBench and `ogdopt judge` read.",
            commands.GenerateConfig,
            (
                Place("model", "Hugging Face folder or hub id"),
                Place("prompts", "JSONL, JSON or Parquet file of prompts, or a hub id"),
            ),
            examples=("ogdopt generate MODEL prompts.jsonl --output_dir answers",),
        ),
        Usage(
            "judge",
            "Whose answers a judge prefers, each prompt in both orders.",
            commands.JudgeConfig,
            (
                Place("baseline", "answers that the others are compared with: a file, or a folder with answers.jsonl"),
                Place("answers", "answers of one or more models (or epochs) to the same prompts", many=True),
            ),
            examples=("ogdopt judge answers/base answers/ogd --judge gpt-4o-mini-2024-07-18",),
        ),
        Usage(
            "pairs",
            "Preference pairs from models' own samples, scored by a rule. A source of answers is `row`, the row's own answer, "
            "or a model, of whose samples the best is chosen and the worst rejected.",
            commands.PairsConfig,
            (Place("rows", "JSONL file or folder, or a hub id, of rows with a prompt"),),
            examples=("ogdopt pairs rows.jsonl --chosen MODEL --rejected row \\", "    --score answer --output_dir pairs"),
        ),
        Usage(
            "separation",
            "How far apart models put two classes of behaviours. The first model is the one before training.",
            commands.SeparationConfig,
            (Place("models", "Hugging Face folders or hub ids", many=True),),
            examples=("ogdopt separation before after --data_dir persona",),
        ),
        Usage(
            "study",
            "A toy study of a paper; without NAME it lists them.",
            commands.ToyDataConfig,
            (Place("name", "the study", needed=False),),
        ),
        Usage(
            "report",
            "Writes the report of a study again. It needs no torch.",
            commands.ReportOptions,
            (DIRECTORY,),
            examples=("ogdopt report runs/miniature --confidence 0.9",),
        ),
        Usage(
            "sentiment",
            "Tweets as preference pairs in one style, for the recipe gpt2_sentiment.",
            commands.SentimentConfig,
            examples=('ogdopt sentiment --data_dir FOLDER --style "long suffix"',),
        ),
        Usage(
            "recipes",
            "Lists the recipes and launch files. With NAME it prints the path of one, to copy or to start.",
            commands.NoOptions,
            (Place("name", "a recipe or a launch file", needed=False),),
            examples=('cp "$(ogdopt recipes miniature)" mine.yaml', 'sbatch "$(ogdopt recipes slurm.sh)" --config mine.yaml'),
        ),
        Usage(
            "completion",
            "What makes a shell complete commands and options with TAB.",
            commands.NoOptions,
            (Place("shell", "bash, zsh, fish or tcsh"),),
            examples=('eval "$(ogdopt completion bash)"   # in ~/.bashrc',),
        ),
    )
}
"""Name of a command -> how it is called, in the order of --help."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a command line asks of a study's command: its configuration, and how it is started."""

    config: Config
    dry_run: bool = False
    """Check data and settings and say what a run would take, instead of running."""
    world_size: int = 1
    """Processes that a dry run estimates for."""
    note: str = ""
    """What is to be said of a configuration without --config."""


@cache
def toys() -> dict[str, tuple[str, bool]]:
    """The toy studies there are: the first sentence of each, and whether it reads data. No study is imported."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == "study":
                names = [argument.arg for argument in node.args.args]
                found[path.stem] = ((ast.get_docstring(tree) or "").split("\n")[0], "data_dir" in names)
    return found


def toy_usage(name: str) -> Usage:
    """How one toy study is called. Raises ValueError where there is none of that name."""
    known = toys()
    if name not in known:
        raise ValueError(f"there is no study {name!r}{meant(nearest(name, known), '')} (`ogdopt study` lists them)")
    sentence, reads = known[name]
    return Usage(f"study {name}", sentence, commands.ToyDataConfig if reads else commands.ToyConfig)


def toy_list() -> str:
    """The toy studies, one a line."""
    return "\n".join(rows([(name, sentence) for name, (sentence, _) in toys().items()], 14))


def asked(name: str, words: list[str]) -> tuple[Any, dict[str, Any]]:
    """A command's options and the words of its places. Raises ValueError with one message for a mistake."""
    if name == "study" and words and not words[0].startswith("-"):
        toy, *words = words
        usage = toy_usage(toy)
        return read(usage, split(usage, words)), {"name": toy}
    usage = USAGES[name]
    given = split(usage, words)
    if name == "run":
        return study(given), given.places
    if name == "tax":
        recipe = None if given.among(["config"]) else RECIPES / "tax.yaml"
        return Asked(read(usage, given, recipe)), given.places
    return read(usage, given), given.places


def study(given: Given) -> Asked:
    """The study of a command line: of a recipe, of a user's own model or data, or the miniature one."""
    usage, recipe, note = USAGES["run"], None, ""
    if not given.among(["config"]):
        own = given.among(OWN)
        recipe = None if own else DEFAULT_RECIPE
        note = OWN_NOTE if own else MINIATURE_NOTE
    launch = read_apart(usage, given)
    return Asked(read(usage, given, recipe), launch.dry_run, launch.processes, note)


MINIATURE_NOTE = (
    "No --config: this is the miniature study (ogdopt run --config miniature).\n"
    "For data of your own: --model.model_name_or_path and --preference.data.train."
)
OWN_NOTE = (
    "No --config, and a model or data of your own: other options have their defaults\n"
    "(ogdopt run --help SECTION; --print_config shows them all)."
)


def parse(words: list[str]) -> Config:
    """The configuration of `ogdopt run` with these words."""
    return asked("run", words)[0].config


def recipe_list() -> str:
    """Recipes and launch files: each one's name, and the first sentence of its comment."""
    lines = ["recipes (ogdopt run --config NAME):"]
    lines += rows([(name, title(path)) for name, path in recipes().items()], 6)
    lines += ["", "launch files (ogdopt recipes NAME prints the path):"]
    lines += rows([(name, title(path)) for name, path in launch_files().items()], 12)
    return "\n".join(lines)
