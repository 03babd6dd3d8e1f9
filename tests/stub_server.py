"""An OpenAI-compatible server on this machine that misbehaves on demand, for tests of what asks one."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(content, asked=(), **changes):
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    read = sum(len(message["content"]) for message in asked) // 4
    usage = {"prompt_tokens": read, "completion_tokens": 100, "total_tokens": read + 100}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage} | changes


class Server(ThreadingHTTPServer):
    """`judge(messages) -> reply`; the n-th request is treated as `faults[n]` says, "" being well."""

    daemon_threads = True

    def __init__(self, judge, faults=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.judge, self.faults, self.lock = judge, list(faults), threading.Lock()
        self.requests, self.keys, self.times = [], set(), []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """A client that gave up is no error here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, status, body, headers=(), length=None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length or len(data)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        server = self.server
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers.get("Authorization", "")
        with server.lock:
            server.requests.append(asked)
            server.times.append(time.monotonic())
            server.keys.add(key)
            fault = server.faults.pop(0) if server.faults else ""
        reply = completion(server.judge(asked["messages"]), asked["messages"])
        if fault.isdigit():
            wait = [("Retry-After", "0.3")] if fault == "429" else []
            self.send(int(fault), {"error": {"message": f"no, not with {key}"}}, wait)
        elif fault == "timeout":
            time.sleep(1.5)
            self.send(200, reply)
        elif fault == "malformed":
            self.send(200, json.dumps(reply).encode()[:-20])
        elif fault == "html":
            self.send(200, b"<html>bad gateway</html>")
        elif fault == "cut":  # fewer bytes than announced
            self.send(200, json.dumps(reply).encode()[:40], length=4000)
            self.close_connection = True
        elif fault == "cut stream":  # a chunked body that never ends
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"14\r\n" + json.dumps(reply).encode()[:20] + b"\r\n")
            self.close_connection = True
        elif fault == "no choices":
            self.send(200, completion("", choices=[]))
        elif fault == "no text":
            self.send(200, completion(None))
        elif fault == "hang up":
            self.close_connection = True
        else:
            self.send(200, reply)


@contextmanager
def serving(judge, faults=()):
    """A server for the time of a test."""
    server = Server(judge, faults)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
