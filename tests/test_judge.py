"""The pairwise judge, against a server that misbehaves; win rates against what is known of them."""

import json
import logging
import re

import numpy as np
import pytest

pytest.importorskip("openai")

from ogdopt_harness.analysis.winrate import length_controlled, win_rate
from ogdopt_harness.cli import command
from ogdopt_harness.commands.judge import judge, verdict_of
from ogdopt_harness.common.journal import Journal
from ogdopt_harness.config.commands import JudgeConfig
from ogdopt_harness.evaluation import endpoint
from ogdopt_harness.evaluation.endpoint import Endpoint, Prices, SpentError
from tests.hub import write_rows
from tests.stub_server import serving

SECRET = "sk-very-secret-0123456789"
FAULTS = ["429", "500", "503", "timeout", "malformed", "html", "cut", "cut stream", "no choices", "no text", "hang up"]


def answer_of(messages, name):
    return re.search(rf"<\|answer {name}\|>\n(.*?)\n<\|end of", messages[1]["content"], re.S).group(1)


def prefers_good(messages):
    """A judge that prefers the answer with more "good" in it, in either order."""
    a, b = (answer_of(messages, name).count("good") for name in "AB")
    return f"[[B>A]] at first, but [[{'A>B' if a > b else 'B>>A' if b > a else 'A=B'}]]"


def answers(folder, name, outputs):
    rows = [
        {"id": str(i), "messages": [{"role": "user", "content": f"question {i}"}], "output": text, "finish_reason": "stop"}
        for i, text in enumerate(outputs)
    ]
    (folder / name).mkdir(parents=True, exist_ok=True)
    write_rows(folder / name / "answers.jsonl", rows)
    return folder / name


@pytest.fixture
def two(tmp_path):
    base = answers(tmp_path, "base", ["good"] * 12)
    return base, answers(
        tmp_path, "ours", ["good good", "bad", "good"] * 4
    )  # 4 wins, 4 losses, 4 ties of equal answers, each of which is one question


def settings(tmp_path, server, **options):
    kept = dict(base_url=server.url, cache=str(tmp_path / "cache.jsonl"), backoff=0.01, timeout=1.0, samples=500)
    return JudgeConfig(**(kept | options))


def test_both_orders_are_asked_and_every_fault_is_survived(two, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    base, ours = two
    with serving(prefers_good, FAULTS) as server:
        (found,) = judge(base, [ours], settings(tmp_path, server, concurrency=3))
        assert len(server.requests) == 20 + len(FAULTS)
        (again,) = judge(base, [ours], settings(tmp_path, server))
        assert len(server.requests) == 20 + len(FAULTS) and again == found  # nothing is paid twice
        assert server.keys == {f"Bearer {SECRET}"}
    assert found["win_rate"]["value"] == 0.5 and found["win_rate"]["low"] < 0.5 < found["win_rate"]["high"]
    assert found["prompts"] == 12 and found["unparsed"] == 0 and found["position_consistency"] == 1.0
    assert sorted(found["scores"].values()) == [0.0] * 4 + [0.5] * 4 + [1.0] * 4
    assert json.loads((ours / "judge.json").read_text()) == found and found["cut_off"] == 0.0
    out = capsys.readouterr().out
    assert "20 questions to gpt-4o-mini-2024-07-18 (0 more are cached)" in out and "0 questions" in out
    assert re.search(r"spent: \$0.00 \(3,\d\d\d input and 2,000 output tokens\)", out)
    assert SECRET not in out and SECRET not in "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_is_told_after_so_many_attempts(tmp_path, fault, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setattr(endpoint, "PATIENCE", 0.02)
    caplog.set_level(logging.DEBUG)
    with serving(prefers_good, [fault] * 9) as server:
        one = Endpoint("m", Journal(tmp_path / "c"), Prices(0, 0), server.url, max_retries=2, timeout=0.3, backoff=0.01)
        with pytest.raises(ValueError, match="m failed 3 times, at last with") as error:
            one.ask([{"role": "user", "content": "?"}])
        assert len(server.requests) == 3 and error.value.__suppress_context__
    assert SECRET not in str(error.value) and SECRET not in caplog.text and not len(Journal(tmp_path / "c"))


def test_a_server_that_asks_for_patience_gets_it(tmp_path):
    with serving(prefers_good, ["429"]) as server:
        one = Endpoint("m", Journal(tmp_path / "c"), Prices(0, 0), server.url, backoff=0.0)
        with pytest.raises(AttributeError):  # the stub's judge wants two answers to compare
            prefers_good([{}, {"content": ""}])
        server.judge = lambda messages: "fine"
        assert one.ask([{"role": "user", "content": "?"}]) == "fine"
        assert 0.3 <= server.times[1] - server.times[0] < 5


def test_a_key_that_is_refused_is_not_shown(two, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with serving(prefers_good, ["401"] * 50) as server:
        with pytest.raises(ValueError, match=r"refuses: .*no, not with Bearer \*\*\*") as error:
            judge(*[two[0], [two[1]]], settings(tmp_path, server, concurrency=1))
        assert SECRET not in str(error.value) and len(server.requests) <= 2  # no second attempt
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="the environment has no OPENAI_API_KEY"):
        judge(two[0], [two[1]], JudgeConfig(cache=str(tmp_path / "c")))


def test_the_cost_is_reckoned_first_and_the_limit_holds(two, tmp_path, capsys):
    base, ours = two
    with serving(prefers_good) as server:
        dear = settings(tmp_path, server, price=[1000.0, 1000.0], budget=1.0, concurrency=1, max_tokens=100)
        with pytest.raises(
            ValueError, match=r"\$\d+\.\d\d \(at most \$\d+\.\d\d\), above the budget of \$1.00; nothing was asked. Say --yes"
        ):
            judge(base, [ours], dear)
        assert not server.requests
        # The answers are longer than was reckoned: 100 tokens instead of 1.
        cheap = settings(tmp_path, server, price=[1000.0, 1000.0], budget=5.0, expected_tokens=1, max_tokens=100, concurrency=4)
        with pytest.raises(SpentError, match=r"beyond the limit of \$5.00"):
            judge(base, [ours], cheap)
        spent = sum(sum(len(m["content"]) for m in asked["messages"]) // 4 + 100 for asked in server.requests) / 1000
        assert 4 < spent <= 5
        before = len(server.requests)
        limit = 4.0
        one = Endpoint("m", Journal(tmp_path / "c"), Prices(1000, 1000), server.url, max_tokens=100, limit=limit)
        server.judge = lambda messages: "[[A=B]]"
        with pytest.raises(
            SpentError, match=r"\$3.00 are spent and another answer might go beyond the limit of \$4.00"
        ) as error:
            for i in range(10):
                one.ask([{"role": "user", "content": f"{i}" * 2000}])
        assert one.spent == pytest.approx(3.0) and len(server.requests) == before + 5 and "--budget" in str(error.value)
        assert len(Journal(tmp_path / "c")) == 5


def test_yes_spends_above_the_budget_and_no_more_than_was_said(two, tmp_path, capsys):
    base, ours = two
    with serving(prefers_good) as server:
        dear = settings(tmp_path, server, price=[1000.0, 1000.0], budget=0.5, max_tokens=100, yes=True)
        (found,) = judge(base, [ours], dear)
        assert len(server.requests) == 20 and found["prompts"] == 12
    out = capsys.readouterr().out
    most, spent = (float(re.search(pattern, out).group(1)) for pattern in (r"at most \$([\d.]+)", r"spent: \$([\d.]+)"))
    assert 0.5 < spent <= most


def test_what_was_paid_before_the_limit_is_kept(two, tmp_path):
    base, ours = two
    with serving(prefers_good) as server:
        options = dict(max_tokens=100, expected_tokens=1, concurrency=1)
        with pytest.raises(SpentError):  # the answers are far longer than reckoned
            judge(base, [ours], settings(tmp_path, server, price=[1000.0, 1000.0], budget=4.0, **options))
        paid = len(server.requests)
        assert 0 < paid < 20
        (found,) = judge(base, [ours], settings(tmp_path, server, price=[0.0, 0.0], **options))
        assert len(server.requests) == 20 and found["prompts"] == 12


def test_answers_without_a_verdict_and_refused_ones_do_not_count(two, tmp_path, capsys):
    base, ours = two

    def moody(messages):
        return "A is better" if "question 0" in messages[1]["content"] else "[[A>B]]"  # always the first

    with serving(moody, ["400"]) as server:
        (found,) = judge(base, [ours], settings(tmp_path, server, concurrency=1))
    assert found["unparsed"] == 2 or found["unparsed"] == 3  # both orders of question 0, of which one was refused
    assert found["position_consistency"] == 0.0 and set(found["scores"].values()) == {0.5}
    assert "have no verdict and do not count" in capsys.readouterr().out


def test_a_judge_that_refuses_everything_is_told(two, tmp_path):
    with serving(prefers_good, ["400"] * 99) as server, pytest.raises(ValueError, match="every question was refused, at last"):
        judge(two[0], [two[1]], settings(tmp_path, server))


def test_official_answers_without_metadata_are_read(two, tmp_path):
    """As those of Arena-Hard's own baseline."""
    base, ours = two
    rows = [{"uid": f"q{i}", "model": "m", "messages": [{"role": "user", "content": f"question {i}"}]} for i in range(12)]
    for row in rows:
        row["messages"].append({"role": "assistant", "content": {"answer": "good"}})
    write_rows(tmp_path / "official.jsonl", rows)
    with serving(prefers_good) as server:
        (found,) = judge(tmp_path / "official.jsonl", [ours], settings(tmp_path, server))
        (same,) = judge(base, [ours], settings(tmp_path, server))
    assert found["scores"] == same["scores"] and len(server.requests) == 20


def test_a_model_against_itself_is_even_whatever_the_judge_prefers(two, tmp_path):
    base, _ = two
    with serving(lambda messages: "[[A>>B]]") as server:
        (found,) = judge(base, [base], settings(tmp_path, server))
    assert found["win_rate"] == {"value": 0.5, "low": 0.5, "high": 0.5}


def test_other_prompts_are_refused(two, tmp_path):
    base, _ = two
    rows = [{"messages": [{"role": "user", "content": "another"}], "output": "x", "id": "0"}]
    write_rows(tmp_path / "other.jsonl", rows)
    with serving(prefers_good) as server, pytest.raises(ValueError, match=r"answers 1 prompts, of which .* answers 0"):
        judge(base, [tmp_path / "other.jsonl"], settings(tmp_path, server))


def test_the_best_of_several_epochs_is_named(tmp_path, capsys):
    base = answers(tmp_path, "base", ["good"] * 6)
    epochs = [answers(tmp_path / "ogd" / "answers", f"epoch-{n}", ["good" * n] * 3 + ["bad"] * 3) for n in (1, 2)]
    with serving(prefers_good) as server:
        words = [str(base), *map(str, epochs), "--base_url", server.url, "--cache", str(tmp_path / "c"), "--samples", "100"]
        with pytest.raises(ValueError, match=r"above the budget of \$0.00; nothing was asked"):
            command(["judge", *words, "--backoff", "0.01", "--price", "[1, 1]", "--budget", "0"])
        command(["judge", *words, "--backoff", "0.01", "--price", "[1, 1]", "--budget", "0", "--yes"])
    out = capsys.readouterr().out
    assert "Highest win rate: ogd/epoch-2" in " ".join(out.split())


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [("[[A>B]]", "A>B"), ("x [[ A>>B ]] y [[B>A]]", "B>A"), ("[[C]]", None), ("", None), ("[[a>b]]", None), ("[A=B]", None)],
)
def test_the_last_verdict_counts(reply, verdict):
    assert verdict_of(reply) == verdict


def test_win_rates_have_intervals_over_prompts():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        scores = rng.choice([0.0, 0.5, 1.0], p=[0.3, 0.2, 0.5], size=200)
        found = win_rate(scores, 1000, seed=seed)
        assert found.value == pytest.approx(scores.mean()) and found.low <= found.value <= found.high
        covered += found.low <= 0.6 <= found.high
    assert 88 <= covered <= 100


def test_length_control_takes_out_what_length_alone_won():
    """Judges that go by length alone, by quality alone, and with equal lengths: hand-made games with known answers."""
    rng = np.random.default_rng(1)
    n = 600
    ours, base = rng.integers(200, 900, n), rng.integers(100, 500, n)
    by_length = (rng.random(n) < 1 / (1 + np.exp(-3 * np.tanh((ours - base) / (ours - base).std())))).astype(float)
    plain, fair = win_rate(by_length, 200).value, length_controlled(by_length, ours, base, 200)
    assert plain > 0.75 and fair.low < 0.5 < fair.high
    covered = 0
    for seed in range(20):
        by_quality = (np.random.default_rng(seed).random(n) < 0.7).astype(float)
        fair = length_controlled(by_quality, ours, base, 100)
        covered += fair.low < 0.7 < fair.high
        assert fair.low > 0.5
    assert covered >= 16
    same = length_controlled(by_quality, base, base, 200)
    assert same.value == pytest.approx(by_quality.mean(), abs=0.005)  # nothing to control for, but for the ridge
    assert 0.9 < length_controlled([1.0] * 50, ours[:50], ours[:50], 50).value < 1.0
