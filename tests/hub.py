"""Real rows of the paper's eight benchmarks, laid out as on the hub: what official task definitions read."""

import json
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "shared" / "data" / "benchmarks"
EIGHT = ["piqa", "social_iqa", "hellaswag", "arc_easy", "arc_challenge", "mmlu", "gsm8k", "boolq"]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def front_matter(configurations):
    """The README by which the hub says what a data set's files are: {configuration: [splits]}."""
    lines = ["---", "configs:"]
    for name, splits in configurations.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [line for split in splits for line in (f"  - split: {split}", f"    path: {name}-{split}.jsonl")]
    return "\n".join([*lines, "---", ""])


def lay_out(folder, hub_id, rows):
    """Write one data set: `rows` is {configuration: {split: [row]}}."""
    home = folder / hub_id
    home.mkdir(parents=True)
    for name, splits in rows.items():
        for split, found in splits.items():
            write_rows(home / f"{name}-{split}.jsonl", found)
    (home / "README.md").write_text(front_matter(rows), encoding="utf-8")


def rows_of(name, n):
    with open(BENCHMARKS / f"{name}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(n), strict=False)]


def arc(row):
    labels = "ABCDE"[: len(row["choices"])]
    choices = {"text": row["choices"], "label": list(labels)}
    return {"id": row["id"], "question": row["question"], "choices": choices, "answerKey": labels[row["answer"]]}


def hellaswag(row):
    _, _, context = row["context"].partition(": ")
    ends = {"endings": row["choices"], "label": str(row["answer"])}
    return {"activity_label": row["activity_label"], "ctx_a": context, "ctx_b": "", **ends}


def siqa(row):
    answers = dict(zip(("answerA", "answerB", "answerC"), row["choices"], strict=True))
    return {"context": row["context"], "question": row["question"], **answers, "label": str(row["answer"] + 1)}


def piqa(row):
    return {"goal": row["question"], "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["answer"]}


def boolq(row):
    return {"question": row["question"], "passage": row["context"], "idx": 0, "label": row["answer"]}


def mmlu(row):
    return {name: row[name] for name in ("question", "subject", "choices", "answer")}


def gsm8k(row):
    return {"question": row["question"], "answer": row["answer"]}


def lay_out_eight(folder, n=12, subjects=None):
    """All eight, n rows each; MMLU with every row of all 57 subjects, or of the first so many."""
    one = {
        "baber/piqa": ("default", piqa, "piqa", ["train", "validation"]),
        "lighteval/siqa": ("default", siqa, "siqa", ["train", "validation"]),
        "Rowan/hellaswag": ("default", hellaswag, "hellaswag", ["train", "validation"]),
        "openai/gsm8k": ("main", gsm8k, "gsm8k", ["train", "test"]),
        "aps/super_glue": ("boolq", boolq, "boolq", ["train", "validation"]),
    }
    for hub_id, (name, form, file, splits) in one.items():
        lay_out(folder, hub_id, {name: {split: [form(row) for row in rows_of(file, n)] for split in splits}})
    splits = ("train", "validation", "test")
    names = {"ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge"}
    lay_out(
        folder,
        "allenai/ai2_arc",
        {name: {split: [arc(r) for r in rows_of(file, n)] for split in splits} for name, file in names.items()},
    )
    found = {}
    for row in rows_of("mmlu", 10_000):
        found.setdefault(row["subject"], []).append(mmlu(row))
    kept = sorted(found)[:subjects]
    lay_out(folder, "cais/mmlu", {subject: {"dev": found[subject][:2], "test": found[subject]} for subject in kept})
