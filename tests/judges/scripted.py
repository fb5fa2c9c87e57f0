"""A small OpenAI-compatible server over a real socket that says what a test tells it to say."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What the server sends: a status, headers and bytes, or nothing until it closes."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    data: bytes = b""
    silent: bool = False


def says(text: str | None, finish: str = "stop", **message: Any) -> Reply:
    """A well-formed chat completion."""
    choice = {"index": 0, "finish_reason": finish, "message": {"content": text, **message}}
    return Reply(
        data=json.dumps({"id": "x", "object": "chat.completion", "choices": [choice]}).encode()
    )


GRADES = "#overall_reasoning fine\n#scores\n1.a no\n1.b 0\n2.a x\n2.b 4\n3.a y\n3.b 5"
Script = Callable[[dict[str, Any], int], Reply]


class Scripted:
    """The server's side: what it was asked, and what it answers."""

    def __init__(self, script: Script):
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.at_once = self.busy = 0
        self.base_url = ""


@contextmanager
def serve(script: Script | Reply) -> Iterator[Scripted]:
    """Serve `script(body, number of the request)` on a free port of this machine."""
    known = Scripted(script if callable(script) else lambda body, n: script)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            with known.lock:
                number = len(known.requests)
                known.requests.append(json.loads(body))
                known.paths.append(self.path)
                known.headers.append({k.lower(): v for k, v in self.headers.items()})
                known.busy += 1
                known.at_once = max(known.at_once, known.busy)
            try:
                reply = known.script(known.requests[number], number)
            finally:
                with known.lock:
                    known.busy -= 1
            if not re.fullmatch(r"/v1(/deployments/[\w-]+)?/chat/completions(\?.*)?", self.path):
                reply = Reply(status=404, data=b"no such path")
            if reply.silent:
                known.closing.wait()
                self.close_connection = True
                return
            # A client that was killed takes no reply.
            with suppress(ConnectionError):
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(reply.data)))
                self.end_headers()
                self.wfile.write(reply.data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    known.base_url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield known
    finally:
        known.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
