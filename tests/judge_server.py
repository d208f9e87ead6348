"""A stub of an OpenAI-compatible endpoint on this machine, with every way of misbehaving that a judge may meet."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What the server does with one request: a status, a body, headers, or nothing at all (`hang`)."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    hang: bool = False


def chat(text: str | None, **message: Any) -> Answer:
    """A chat completion that says `text`."""
    finish = message.pop("finish_reason", "stop")
    return Answer(
        {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": finish,
                    "message": {"role": "assistant", "content": text, **message},
                }
            ],
        }
    )


def completion(text: str) -> Answer:
    """A raw completion that says `text`."""
    choice = {"index": 0, "finish_reason": "stop", "text": text, "logprobs": None}
    return Answer({"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]})


@dataclass
class Stub:
    """A running server: its base URL, and every request it saw (path, headers, body)."""

    url: str
    seen: list[tuple[str, dict[str, str], dict[str, Any]]]
    most_at_once: int = 0


@contextmanager
def judge_server(answer: Callable[[dict[str, Any], int], Answer]) -> Iterator[Stub]:
    """Serve `answer(body, number of the request)` until the block ends."""
    release = threading.Event()
    lock = threading.Lock()
    open_now = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            nonlocal open_now
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(stub.seen)
                stub.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
                open_now += 1
                stub.most_at_once = max(stub.most_at_once, open_now)
            try:
                self._answer(answer(body, number))
            finally:
                with lock:
                    open_now -= 1

        def _answer(self, found: Answer) -> None:
            if found.hang:
                release.wait(30)
                self.close_connection = True
                return
            data = found.body if isinstance(found.body, bytes) else json.dumps(found.body).encode()
            self.send_response(found.status)
            for name, value in {"Content-Type": "application/json", **found.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub = Stub(f"http://127.0.0.1:{server.server_address[1]}/v1", [])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        release.set()
        server.shutdown()
        server.server_close()
        thread.join()
