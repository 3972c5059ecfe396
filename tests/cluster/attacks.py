"""Attacks of another user of the machine on a running job, and secrets in its flags that must stay hidden."""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType

import psutil

from slime.engine.keyed import VARIABLE
from tests.cluster.sockets import Socket, role_of

NOBODY = 65534
ENGINE = {"url": "http://127.0.0.1:9"}
WEIGHTS = {"model_path": "/nowhere", "weight_version": "7"}
REQUESTS: dict[str, list[tuple[str, str, object]]] = {
    "router": [
        ("GET", "/workers", None),
        ("POST", "/workers", ENGINE),
        ("DELETE", "/workers/00000000-0000-0000-0000-000000000000", None),
        ("POST", "/generate", {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}),
        ("POST", "/v1/completions", {"model": "m", "prompt": "a"}),
        ("POST", "/flush_cache", {}),
    ],
    "engine": [
        ("POST", "/generate", {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}),
        ("POST", "/update_weights_from_disk", WEIGHTS),
        ("POST", "/weights_checker", {"action": "reset_tensors"}),
        ("POST", "/abort_request", {"abort_all": True}),
        ("POST", "/pause_generation", {"mode": "abort"}),
        ("GET", "/server_info", None),
    ],
}
"""Requests that are refused without the right key; with it, each is answered or at least judged by its content."""


def ask(port: int, method: str, path: str, body: object = None, key: str | None = None) -> int | None:
    """Return the status; None if nothing at `port` answers over HTTP."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2 if path == "/health" else 20)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def statuses(port: int, role: str, key: str | None, *, only: str = "") -> dict[str, int | None]:
    """Return the answers to REQUESTS of the server of this role at `port`. `only`: one of them, as "POST /generate"."""
    named = {f"{method} {path}": (method, path, body) for method, path, body in REQUESTS[role]}
    return {name: ask(port, *request, key) for name, request in named.items() if only in ("", name)}


def port_of(sockets: Iterable[Socket], role: str) -> int:
    """Return the port on which the server of this role takes requests; gloo answers nothing, metrics any path."""
    ports = [socket.port for socket in sockets if socket.role == role]
    return next(p for p in ports if ask(p, "GET", "/health") == 200 and ask(p, "GET", "/nowhere") != 200)


def as_nobody(sockets: Sequence[Socket]) -> dict[str, dict[str, int | None]]:
    """Return the answers to `REQUESTS` by role and key, when another user sends no key and a wrong one."""
    ports = {role: port_of(sockets, role) for role in REQUESTS}
    command = [sys.executable, __file__, json.dumps(ports)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout
    return json.loads(output)


def environment_of(process: psutil.Process) -> str:
    """Return the flags that a server got in its environment, which only its own user can read."""
    return process.environ().get(VARIABLE, "")


class Judge(BaseHTTPRequestHandler):
    """A judge that repeats the token of each request, and refuses every eighth request with it."""

    requests: list[tuple[str, str | None]]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append((self.path, self.headers["Authorization"]))
        bad = len(self.requests) % 8 == 0
        text = f"no reward for {self.path}" if bad else str(random.random())
        self.send_response(400 if bad else 200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None: ...


PLANTED = {
    name: f"PLANTED{number}{name}"
    for number, name in enumerate(("user", "password", "token", "engine", "router", "control", "file", "redis"))
}
"""Secrets, by what they give access to."""


@contextmanager
def judged() -> Iterator[tuple[list[str], list[tuple[str, str | None]]]]:
    """Return flags with all planted secrets, and the requests of the judge that they name: (path, Authorization)."""
    judge = type("ThisJudge", (Judge,), {"requests": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), judge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"{PLANTED['user']}:{PLANTED['password']}@127.0.0.1:{server.server_port}"
        yield (
            [
                *("--rm-type", "remote_rm", "--rm-url", f"http://{where}/judge?token={PLANTED['token']}"),
                f"--sglang-api-key={PLANTED['engine']}",
                *("--sglang-ssl-keyfile-password", PLANTED["file"]),
                *("--router-api-key", PLANTED["router"]),
                *("--router-control-plane-api-keys", f"me:Me:admin:{PLANTED['control']}"),
                *("--router-redis-url", f"redis://:{PLANTED['redis']}@127.0.0.1:1/0"),
            ],
            judge.requests,
        )
        server.shutdown()


def authorization() -> str:
    """Return the header with the user and password of the judge's URL."""
    return "Basic " + base64.b64encode(f"{PLANTED['user']}:{PLANTED['password']}".encode()).decode()


def leaks(
    everyone: Iterable[psutil.Process], roots: Iterable[Path], secrets: Mapping[str, str] = MappingProxyType(PLANTED)
) -> list[str]:
    """Return the places where a secret can be read: command lines that every user sees, and files under `roots`."""
    found: list[str] = []
    for process in everyone:
        with suppress(psutil.NoSuchProcess):
            found += _found(f"command line of {process.pid}", " ".join(process.cmdline()).encode(), secrets)
    for root in roots:
        for path in [root] if root.is_file() else sorted(root.rglob("*")):
            if path.is_file():
                with suppress(FileNotFoundError):  # an older checkpoint is being removed
                    found += _found(str(path), path.read_bytes(), secrets)
    return found


def _found(where: str, content: bytes, secrets: Mapping[str, str]) -> list[str]:
    return [f"{name} in {where}" for name, secret in secrets.items() if secret.encode() in content]


def own_control_key(everyone: Iterable[psutil.Process]) -> str:
    """Return the key that the run has made for its router's list of engines."""
    hidden = [environment_of(process) for process in everyone if role_of(" ".join(process.cmdline())) == "router"]
    words: list[str] = next(json.loads(text) for text in hidden if text)
    return words[words.index("--control-plane-api-keys") + 1].split(":")[3]


def ray_session(process: psutil.Process) -> Path:
    """Return the session directory of the Ray to which `process`, its GCS, belongs."""
    [word] = [word for word in process.cmdline() if word.startswith("--log_dir=")]
    return Path(word.partition("=")[2])


def main() -> None:
    "localhost".encode("idna")  # otherwise imported later, from a place that another user may not read
    if os.getuid() == 0:  # only root can become another user; the requests are the same
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    ports: dict[str, int] = json.loads(sys.argv[1])
    answers = {f"{role} {key}": statuses(ports[role], role, key) for role in REQUESTS for key in (None, "0" * 64)}
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
