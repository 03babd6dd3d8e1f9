"""Keys stay where they belong: not in messages, not on open wires, not with a stranger."""

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ogdopt_harness.common.journal import Journal
from ogdopt_harness.evaluation import endpoint
from ogdopt_harness.evaluation.endpoint import check_address, masked

KEY = "sk-proj-Ab3dEf9hIj2kLm5n"


@pytest.mark.parametrize(
    "echo",
    [
        KEY,
        f"Bearer {KEY}.",
        " ".join(KEY),
        "sk-proj-Ab3dEf9h ... Ij2kLm5n",
        KEY[:14] + "***",
        KEY.upper(),
        "\n".join(KEY[i : i + 6] for i in range(0, len(KEY), 6)),
        "c2stcHJvai1BYjNkRWY5aElqMmtMbTVu",
        "https://user:pass-word@host/v1",
    ],
)
def test_echoes_are_masked(echo):
    said = masked(f"wrong key: {echo} (401)", [KEY, "pass-word"])
    plain = "".join(filter(str.isalnum, said)).lower()
    whole = "".join(filter(str.isalnum, KEY)).lower()
    assert not [whole[i : i + 6] for i in range(len(whole) - 5) if whole[i : i + 6] in plain]
    assert "***" in said and "pass-word" not in said and said.startswith("wrong key: ") and said.endswith("(401)")


def test_other_texts_stay_as_they_are():
    text = "the model is overloaded, try again in 20 s (https://host/v1, 503)"
    assert masked(text, [KEY, ""]) == text


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://judge.example.org/v1", r"'http://judge.example.org/v1': plain http to another machine .*--allow_http"),
        ("http://u:secret@10.0.0.7/v1", r"'http://\*\*\*@10.0.0.7/v1': plain http"),
        ("http://localhost.example.org", "plain http"),
        ("ftp://localhost/v1", "expected an address such as"),
        ("localhost:8000", "expected an address such as"),
        ("http://[::1/v1", "is no address"),
        ("", "expected an address such as"),
    ],
)
def test_addresses_that_are_refused(address, message):
    with pytest.raises(ValueError, match=message) as said:
        check_address(address, allow_http=False)
    assert "secret" not in str(said.value)


def test_addresses_that_are_fine():
    for address in ("http://localhost:8000/v1", "http://127.0.0.1:1/v1", "http://[::1]:1/v1", "https://example.org", None):
        assert check_address(address, allow_http=False) == []
    assert check_address("http://example.org/v1", allow_http=True) == []
    assert check_address("https://user:word@example.org", allow_http=False) == ["word", "user"]


class Server(BaseHTTPRequestHandler):
    """Answers every question with a redirection or with an answer without end."""

    def do_POST(self):
        if "away" in self.path:
            self.send_response(307)
            self.send_header("Location", "http://elsewhere.example.org/v1")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(b'{"choices": "')
            for _ in range(1000):
                self.wfile.write(b"x" * 1000)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("path", "message"),
    [("away", "sends its users to http://elsewhere.example.org/v1; nothing was sent there"), ("long", "ReadError|Connection")],
)
def test_servers_that_lead_away_or_never_end(path, message, tmp_path, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setattr(endpoint, "MOST_BYTES", 10_000)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/{path}"
        asked = endpoint.Endpoint("judge", Journal(tmp_path / "j.jsonl"), endpoint.Prices(0, 0), address, max_retries=0)
        with pytest.raises(ValueError, match=message):
            asked.ask([{"role": "user", "content": "hello"}])
    finally:
        server.shutdown()
        server.server_close()
