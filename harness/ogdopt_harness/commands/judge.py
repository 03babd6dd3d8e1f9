"""Whose answers a judge prefers: `ogdopt judge BASELINE ANSWERS... --judge MODEL`, each prompt in both orders.

BASELINE and ANSWERS are files of answers (`evaluation/answer_files.py`) or folders that hold an answers.jsonl. The cost is
estimated first; nothing that is in the cache is asked again. Each model's result goes into judge.json next to its
answers, where reports find it: runs/<study>/seed-<k>/<run>/answers/epoch-<n>/judge.json chooses that run's best epoch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text
from tqdm import tqdm

from ogdopt_harness.analysis.winrate import length_controlled, win_rate
from ogdopt_harness.common.files import write_json
from ogdopt_harness.common.journal import Journal
from ogdopt_harness.common.run_folder import AnswersFolder, answers_of, short_name
from ogdopt_harness.common.tables import NONE, Table, interval, number, percent
from ogdopt_harness.config.commands import JudgeConfig
from ogdopt_harness.evaluation.answer_files import Answer, Messages, read_answers
from ogdopt_harness.evaluation.endpoint import LETTERS, PRICES, Endpoint, Prices, RefusedError

VERDICT = re.compile(r"\[\[\s*(A>>B|A>B|A=B|B>A|B>>A|A<B|A<<B)\s*\]\]")
FOR_A = {"A>>B": 1.0, "A>B": 1.0, "A=B": 0.5, "B>A": 0.0, "B>>A": 0.0, "A<B": 0.0, "A<<B": 0.0}
UNPARSED = 0.05  # share of answers without a verdict, above which a warning is due
INSTRUCTION = (
    "You compare the answers of two assistants, A and B, to the same user. Decide which answer serves the user better: is it "
    "correct, does it do what was asked, is it clear and complete without padding? The order in which they stand, their length "
    "and their formatting are no merits in themselves. First give your reasons in a few sentences. Then end with exactly one "
    "of these verdicts on a line of its own: [[A>>B]] A is much better, [[A>B]] A is better, [[A=B]] they are equally good, "
    "[[B>A]] B is better, [[B>>A]] B is much better."
)


class Game(NamedTuple):
    """One prompt with both answers in one order; the model's answer is A unless `swapped`."""

    key: str
    swapped: bool
    messages: Messages


def main(config: JudgeConfig, baseline: str, answers: Sequence[str]) -> None:
    """Judge, print the table and write each model's judge.json."""
    judge(Path(baseline), [Path(path) for path in answers], config)


def judge(baseline: Path, models: Sequence[Path], config: JudgeConfig) -> list[dict[str, Any]]:
    """The results of all models, in order, as they are in their judge.json.

    Raises ValueError for answers to other prompts, for an estimate above the budget, at the limit, and where the judge fails
    for good; what it has answered by then is kept.
    """
    reference = read_answers(_file(baseline))
    answers = {path: _aligned(read_answers(_file(path)), reference, path, baseline, config.limit) for path in models}
    endpoint = Endpoint(
        config.judge,
        Journal(Path(config.cache)),
        _prices(config),
        config.base_url,
        config.max_tokens,
        config.max_retries,
        config.timeout,
        backoff=config.backoff,
        allow_http=config.allow_http,
    )
    games = {
        path: [game for key, own in mine.items() for game in _games(key, own, reference[key])] for path, mine in answers.items()
    }
    _reckon([game for found in games.values() for game in found], endpoint, config)
    results = []
    for path, mine in answers.items():
        verdicts = _play(games[path], endpoint, config, short_name(path))
        result = {"answers": str(path), "baseline": str(baseline), "judge": config.judge}
        result |= summary(mine, reference, verdicts, config)
        write_json(answers_of(path).judged, result)
        results.append(result)
    _show({short_name(path): result for path, result in zip(models, results, strict=True)}, baseline, endpoint)
    return results


def _file(path: Path) -> Path:
    return AnswersFolder(path).answers if path.is_dir() else path


def _aligned(
    mine: dict[str, Answer], reference: dict[str, Answer], path: Path, baseline: Path, limit: int | None
) -> dict[str, Answer]:
    shared = {key: answer for key, answer in mine.items() if key in reference}
    if not shared or (limit is None and len(shared) < len(mine)):
        raise ValueError(
            f"{path} answers {len(mine)} prompts, of which {baseline} answers {len(shared)}; expected the same prompts"
        )
    return dict(list(shared.items())[:limit])


def _prices(config: JudgeConfig) -> Prices:
    if config.price is not None:
        if len(config.price) != 2:
            raise ValueError(f"price is {config.price}; expected two numbers: dollars for a million input and output tokens")
        return Prices(*config.price)
    if config.base_url is not None:
        return Prices(0.0, 0.0)
    if config.judge not in PRICES:
        raise ValueError(
            f"no price is known for {config.judge!r}; give one: --price '[INPUT, OUTPUT]', dollars for a million tokens"
        )
    return PRICES[config.judge]


def _games(key: str, mine: Answer, theirs: Answer) -> list[Game]:
    def asked(first: Answer, second: Answer) -> Messages:
        talk = "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in mine.messages)
        parts = [("the conversation", talk), ("answer A", first.output), ("answer B", second.output)]
        text = "\n\n".join(f"<|{name}|>\n{content}\n<|end of {name}|>" for name, content in parts)
        return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text}]

    return [Game(key, False, asked(mine, theirs)), Game(key, True, asked(theirs, mine))]


def _reckon(games: Sequence[Game], endpoint: Endpoint, config: JudgeConfig) -> None:
    """Print what it will cost, and set the limit. Raises ValueError above the budget."""
    open_games = {endpoint.id_of(game.messages): game for game in games}
    cached = sum(key in endpoint.journal for key in open_games)
    to_ask = [game for key, game in open_games.items() if key not in endpoint.journal]
    read = sum(len(message["content"]) for game in to_ask for message in game.messages) // LETTERS
    written = len(to_ask) * config.expected_tokens
    cost = (read * endpoint.prices.input + written * endpoint.prices.output) / 1e6
    most = sum(endpoint.most(game.messages) for game in to_ask)
    estimate = (
        f"{len(to_ask)} questions to {config.judge} ({cached} more are cached): about {read:,} input and {written:,} output "
        f"tokens, ${cost:.2f} (at most ${most:.2f})"
    )
    print(estimate, flush=True)
    if cost > config.budget and not config.yes:
        raise ValueError(
            f"{estimate}, above the budget of ${config.budget:.2f}; nothing was asked. Say --yes to spend that, raise "
            "--budget, or judge fewer prompts (--limit)"
        )
    endpoint.limit = max(config.budget, 1.01 * most) if config.yes else config.budget


def _play(games: Sequence[Game], endpoint: Endpoint, config: JudgeConfig, name: str) -> dict[str, dict[bool, str | None]]:
    """The verdict of each game by prompt and order; None where the judge gave none, or refused."""
    verdicts: dict[str, dict[bool, str | None]] = {}
    refused: list[RefusedError] = []
    with ThreadPoolExecutor(config.concurrency) as pool:
        # Equal answers make one question of both orders, which is not asked twice.
        running = {endpoint.id_of(game.messages): game for game in games}
        futures = {key: pool.submit(endpoint.ask, game.messages) for key, game in running.items()}
        asked = [(game, futures[endpoint.id_of(game.messages)]) for game in games]
        try:
            for game, future in tqdm(asked, desc=f"judging {name}", disable=not sys.stderr.isatty(), leave=False):
                try:
                    verdict = verdict_of(future.result())
                except RefusedError as error:
                    verdict = None
                    refused.append(error)
                verdicts.setdefault(game.key, {})[game.swapped] = verdict
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what is in flight is paid for, and kept
            raise
    if len(refused) == len(games):
        raise ValueError(f"every question was refused, at last with: {refused[-1]}")
    return verdicts


def verdict_of(reply: str) -> str | None:
    """The last verdict in a judge's reply.

    >>> verdict_of("[[A>B]] at first sight, but no: [[B>>A]]"), verdict_of("A is better")
    ('B>>A', None)
    """
    found = VERDICT.findall(reply)
    return found[-1] if found else None


def summary(
    mine: dict[str, Answer], reference: dict[str, Answer], verdicts: dict[str, dict[bool, str | None]], config: JudgeConfig
) -> dict[str, Any]:
    """Win rates, lengths, and how much the judge can be trusted. A prompt's score is the mean of its games with a verdict."""
    scores: dict[str, float] = {}
    agreed = []
    for key, found in verdicts.items():
        games = {s: (1 - FOR_A[v] if s else FOR_A[v]) for s, v in found.items() if v is not None}
        if games:
            scores[key] = sum(games.values()) / len(games)
        if len(games) == 2:
            agreed.append(games[False] == games[True])
    unparsed = sum(verdict is None for found in verdicts.values() for verdict in found.values())
    lengths = {name: [len(found[key].output) for key in scores] for name, found in (("model", mine), ("base", reference))}
    result: dict[str, Any] = {
        "prompts": len(verdicts),
        "unparsed": unparsed,
        "position_consistency": float(np.mean(agreed)) if agreed else None,
        "win_rate": None,
        "length_controlled_win_rate": None,
    }
    if scores:
        plain = win_rate(list(scores.values()), config.samples, config.confidence)
        controlled = length_controlled(list(scores.values()), lengths["model"], lengths["base"], confidence=config.confidence)
        result |= {"win_rate": plain._asdict(), "length_controlled_win_rate": controlled._asdict()}
        result |= {"mean_length": float(np.mean(lengths["model"])), "baseline_mean_length": float(np.mean(lengths["base"]))}
    known = [answer for answer in mine.values() if answer.finish_reason]
    result["cut_off"] = sum(answer.finish_reason == "length" for answer in known) / len(known) if known else None
    result["confidence"] = config.confidence
    result["scores"] = scores
    return result


def _show(results: dict[str, dict[str, Any]], baseline: Path, endpoint: Endpoint) -> None:
    def rate(found: dict[str, float] | None) -> str:
        if found is None:
            return NONE
        return f"{percent(found['value'])} {interval(100 * found['low'], 100 * found['high'], 1)}"

    rows = [
        [
            name,
            rate(r["win_rate"]),
            rate(r["length_controlled_win_rate"]),
            str(r["prompts"]),
            str(r["unparsed"]),
            percent(r["position_consistency"], 0),
            f"{number(r.get('mean_length'), 0)} / {number(r.get('baseline_mean_length'), 0)}",
            percent(r["cut_off"], 0),
        ]
        for name, r in results.items()
    ]
    asked = ["prompts", "no verdict", "orders agree"]
    columns = ["answers of", "win rate", "at equal length", *asked, "letters / baseline's", "cut off"]
    console = Console(width=None if sys.stdout.isatty() else 160)
    Table(f"Against {short_name(baseline)}, judged by {endpoint.model}", columns, rows).show(console)
    rated = {name: r["win_rate"]["value"] for name, r in results.items() if r["win_rate"]}
    if len(rated) > 1:
        console.print(Text(f"Highest win rate: {max(rated, key=lambda name: rated[name])}"))
    for name, r in results.items():
        if r["unparsed"] > UNPARSED * 2 * r["prompts"]:
            share = f"{r['unparsed']} of {2 * r['prompts']} judgements"
            console.print(Text(f"! {share} of {name} have no verdict and do not count"))
    print(f"spent: ${endpoint.spent:.2f} ({endpoint.usage[0]:,} input and {endpoint.usage[1]:,} output tokens)")
