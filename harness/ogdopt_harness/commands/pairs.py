"""Preference pairs from a model's own answers: `ogdopt pairs ROWS --chosen SOURCE --rejected SOURCE --output_dir DIR`.

A source is `row`, the answer that the row itself has, or a model (folder or hub id), of whose samples the best becomes the
chosen answer and the worst the rejected one: the scenarios of "3D-properties", from any mix of sources.

    1  --chosen MODEL --rejected MODEL       3  --chosen MODEL --rejected row
    2  --chosen row   --rejected MODEL       4  both from the rows: those are the pairs already

Samples are kept in `DIR/samples-<model>.jsonl` as they come, and the same command goes on from there; then `DIR/pairs.jsonl` is
written, in the format that training reads. To use another judge, score these samples elsewhere, write lines {prompt,
answer, score}, and give them with `--score scores:FILE`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from ogdopt_harness.common.device import device_name
from ogdopt_harness.common.files import write_text
from ogdopt_harness.common.journal import Journal
from ogdopt_harness.common.ranks import ALONE, Ranks, sharing
from ogdopt_harness.common.run_folder import short_name
from ogdopt_harness.common.sources import RowError, kind_of, read
from ogdopt_harness.config.commands import ROW, PairsConfig
from ogdopt_harness.data.rows import as_messages, parse
from ogdopt_harness.evaluation.items import judge_style, naming, read_patterns, read_rows
from ogdopt_harness.evaluation.lm import decoded, ends_of, generating, load
from ogdopt_harness.modeling.fingerprint import fingerprint
from ogdopt_harness.modeling.pretrained import read_config
from ogdopt_harness.pipeline.manifest import record

NOT_SAMPLING = ("output_dir", "chosen", "rejected", "score", "limit", "device")
"""Options that may differ between commands on the same samples."""


@dataclass(frozen=True)
class Ask:
    """One prompt, what the rows have for it, and the seed that it is sampled with."""

    id: str
    prompt: Any
    messages: list[dict[str, str]]
    answers: tuple[str, str] | None
    answer: str | None
    seed: int


Score = Callable[[Ask, str], float]


def main(config: PairsConfig, rows: str) -> None:
    """Sample, score, and write the pairs."""
    with sharing() as ranks:
        make_pairs(rows, config, ranks)


def make_pairs(rows: str, config: PairsConfig, ranks: Ranks = ALONE) -> Path:
    """Sample, score and write; the path of pairs.jsonl. Raises ValueError for what cannot be used, by place or option."""
    asks = read_asks(rows, config)
    score = scorer(config.score, asks)
    directory = Path(config.output_dir)
    models = sorted({config.chosen, config.rejected} - {ROW})
    if len({samples_file(config, model) for model in models}) < len(models):
        raise ValueError(
            f"the models {' and '.join(models)} end in the same folders, so their samples would be one file; move one"
        )

    def note() -> None:
        kept = {k: v for k, v in asdict(config).items() if k not in NOT_SAMPLING}
        weights = {m: fingerprint(m, config=read_config(m, "model")) for m in models}
        record(directory, {"rows": rows, "weights": weights, **kept}, {"name": "pairs", "kind": "pairs", "method": "sampling"})

    ranks.on_first(note)
    for model in models:
        sample(model, asks, config, ranks)
    ranks.wait()
    file = directory / "pairs.jsonl"

    def write() -> None:
        samples = {model: Journal(samples_file(config, model)) for model in models}
        pairs, left_out = paired(asks, samples, score, config)
        if not pairs:
            raise ValueError(
                f"none of {len(asks)} prompts gave a pair ({said(left_out)}); raise num_return_sequences or temperature"
            )
        write_text(file, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
        print(f"{len(pairs)} pairs of {len(asks)} prompts; left out: {said(left_out) or 'none'}\nWritten: {file}")

    ranks.on_first(write)
    return file


def said(left_out: dict[str, int]) -> str:
    """Reasons and how often each was met."""
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)


def read_asks(source: str, config: PairsConfig) -> list[Ask]:
    """The rows' prompts, the first `limit`, repeated ones once. Raises ValueError with the place of one that cannot be used."""
    needs_pair = ROW in (config.chosen, config.rejected)
    found: dict[str, Ask] = {}
    for number, (where, raw) in enumerate(read(source, config.split, "rows")):
        if config.limit is not None and number == config.limit:
            break
        try:
            if isinstance(raw, RowError):
                raise raw
            if not isinstance(raw, dict):
                raise RowError("not an object", "", kind_of(raw), "expected a JSON object a line")
            row = parse(where, raw, {}, "preference") if needs_pair else None
            if row is not None and len(row.answers) != 2:
                raise RowError(
                    "no pair", "", f"a row of format {row.format}", "expected chosen and rejected, since a source is 'row'"
                )
            prompt = raw.get("prompt") if row is None else row.prompt
            if not prompt or not isinstance(prompt, (str, list)):
                raise RowError("no prompt", "prompt", kind_of(prompt), "expected a text or a list of messages")
            messages = as_messages(prompt)
            if config.score == "answer" and not isinstance(raw.get("answer"), str):
                raise RowError("no answer", "answer", kind_of(raw.get("answer")), "expected a text, since score is 'answer'")
        except RowError as problem:
            raise ValueError(str(problem.at(where))) from problem
        key = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]
        answers = None if row is None else (row.answers[0], row.answers[1])
        found.setdefault(key, Ask(key, prompt, messages, answers, raw.get("answer"), config.seed + number))
    if not found:
        raise ValueError(f"rows: {source} holds none; expected at least one prompt")
    return list(found.values())


def scorer(how: str, asks: Sequence[Ask]) -> Score:
    """The function that scores a sample. Raises ValueError for an unknown one, a missing file and a line that is no score."""
    kind, _, file = how.partition(":")
    if kind == "answer" and not file:
        return lambda ask, text: float(naming(ask.answer or "").search(text) is not None)
    if kind == "style" and file:
        patterns = read_patterns(Path(file))

        def style(ask: Ask, text: str) -> float:
            shown = judge_style(patterns, [text])
            return float(shown["chosen"] - shown["rejected"])

        return style
    if kind != "scores" or not file:
        raise ValueError(f"score is {how!r}; expected style:FILE, answer, or scores:FILE")
    prompts = {json.dumps(ask.prompt, sort_keys=True): ask.id for ask in asks}
    known: dict[tuple[str, str], float] = {}
    for where, row in read_rows(Path(file), "score"):
        value = row.get("score")
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not isinstance(row.get("answer"), str):
            raise ValueError(
                f"{where}: answer is {kind_of(row.get('answer'))} and score {kind_of(value)}; expected a text and a number"
            )
        if (ask := prompts.get(json.dumps(row.get("prompt"), sort_keys=True))) is not None:
            known[ask, row["answer"]] = float(value)

    def looked_up(ask: Ask, text: str) -> float:
        if (ask.id, text) not in known:
            raise ValueError(
                f"score: {file} has no line for the answer {text[:60]!r} to {str(ask.prompt)[:60]!r}; score it too"
            )
        return known[ask.id, text]

    return looked_up


def samples_file(config: PairsConfig, model: str) -> Path:
    """Where a model's samples are kept."""
    return Path(config.output_dir) / f"samples-{short_name(Path(model)).replace('/', '-')}.jsonl"


def sample(model: str, asks: Sequence[Ask], config: PairsConfig, ranks: Ranks) -> None:
    """Sample what the journal lacks, a prompt at a time, so that what is drawn depends on the prompt's own seed alone."""
    journal = Journal(samples_file(config, model), rank=ranks.rank)
    missing = ranks.share([ask for ask in asks if ask.id not in journal])
    if not missing:
        return
    loaded, words = load(model, device_name(config.device), tokenizer=config.tokenizer, apply_chat_template=True)
    ends = ends_of(loaded, words)
    pad = words.pad_token_id if words.pad_token_id is not None else (ends or [0])[0]
    drawing = GenerationConfig(
        do_sample=True,
        num_return_sequences=config.num_return_sequences,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=0,
        max_new_tokens=config.max_new_tokens,
        pad_token_id=pad,
        eos_token_id=ends or None,
    )
    for ask in tqdm(missing, desc="sampling", disable=not ranks.first or not sys.stderr.isatty()):
        text = words.apply_chat_template(ask.messages, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([words(text, add_special_tokens=False).input_ids], device=loaded.device)
        torch.manual_seed(ask.seed)
        with generating(loaded, drawing):
            found = loaded.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
        replies = [reply.strip() for reply in decoded(words, found[:, ids.shape[1] :].tolist())]
        journal.add([{"id": ask.id, "prompt": ask.prompt, "answers": replies}])


def paired(
    asks: Sequence[Ask], samples: dict[str, Journal], score: Score, config: PairsConfig
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """(the pairs, how many prompts were left out for which reason); of equal scores the first sample counts."""
    left_out = {"of equal scores": 0, "with empty answers alone": 0, "with the same answer twice": 0}
    pairs = []
    for ask in asks:
        scored = {model: {t: score(ask, t) for t in journal[ask.id]["answers"] if t} for model, journal in samples.items()}
        if not all(scored.values()):
            left_out["with empty answers alone"] += 1
            continue
        if config.chosen == config.rejected and len(set(scored[config.chosen].values())) == 1:
            left_out["of equal scores"] += 1
            continue
        pair: dict[str, Any] = {"prompt": ask.prompt}
        for side, source, best in (("chosen", config.chosen, max), ("rejected", config.rejected, min)):
            if source == ROW:
                assert ask.answers is not None
                pair |= {side: ask.answers[side == "rejected"], f"source_{side}": ROW}
            else:
                text = best(scored[source], key=scored[source].__getitem__)
                pair |= {side: text, f"source_{side}": source, f"score_{side}": scored[source][text]}
        if pair["chosen"] == pair["rejected"]:
            left_out["with the same answer twice"] += 1
            continue
        pairs.append(pair)
    return pairs, left_out
