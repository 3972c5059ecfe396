"""A kind of engine in one file, as `tests/engine/test_kinds.py` adds it: a small HTTP server that knows GET /health."""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

from slime.config.args import Args
from slime.engine.command_line import ServerCommand
from slime.engine.kinds.kind import EngineKind, EngineStart


def command(args: Args, start: EngineStart) -> ServerCommand:
    """Return how to run this file as a server."""
    return ServerCommand("tests.engine.dummy_kind", (start.host, str(start.port), start.model_path))


KIND = EngineKind(command=command, phases=(("opening", "opening its server"),))


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()


if __name__ == "__main__":
    print("opening", sys.argv[3], flush=True)
    HTTPServer((sys.argv[1], int(sys.argv[2])), _Handler).serve_forever()
