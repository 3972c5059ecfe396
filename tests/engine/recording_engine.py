"""An HTTP server that a router takes for an engine; it records the keys it gets, and answers every request."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Recording:
    """A server. `asked` holds path and Authorization header of each request except health checks."""

    url: str
    prompts: list[list[int]] = field(default_factory=list[list[int]])
    """The `input_ids` of each /generate that has them."""
    asked: list[tuple[str, str | None]] = field(default_factory=list[tuple[str, str | None]])

    def generations(self) -> list[str | None]:
        return [header for path, header in self.asked if path == "/generate"]


@contextmanager
def recording_engine(answers: threading.Event | None = None) -> Iterator[Recording]:
    """Serve such an engine; with `answers` it answers a request for tokens only once the event is set."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked = self.rfile.read(int(self.headers["Content-Length"] or 0))
            if self.path == "/generate" and "input_ids" in (request := json.loads(asked)):
                recording.prompts.append(request["input_ids"])
                if answers is not None:
                    answers.wait(60)
            if self.path != "/health":
                recording.asked.append((self.path, self.headers["Authorization"]))
            body = json.dumps(
                {"text": "", "output_ids": [1], "meta_info": {}, "model_path": "m", "tp_size": 1}
            ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        recording = Recording(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield recording
        server.shutdown()
