"""The sockets of a running job, and whether Ray's servers require the token; docs/security.md has these rows."""

from __future__ import annotations

import ipaddress
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil

SECURITY = Path(__file__).parents[2] / "docs" / "security.md"

CORE_WORKER = "/ray.rpc.CoreWorkerService/GetCoreWorkerStats"
ROLES = {
    "driver": CORE_WORKER,
    "rollout manager": CORE_WORKER,
    "trainer": CORE_WORKER,
    "engine's owner": CORE_WORKER,
    "engine": None,
    "router": None,
    "Ray's gcs_server": "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "Ray's raylet": "/ray.rpc.NodeManagerService/GetNodeStats",
    "Ray's dashboard agent": "/ray.rpc.ReporterService/HealthCheck",
    "Ray's runtime environment agent": "GET /",
    "Ray's dashboard": None,
    "Ray's monitor": None,
    "Ray's idle worker": None,
}
"""Every role that may listen, and a request that one of Ray's ports answers to clients with the token."""

ALWAYS = frozenset(ROLES) - {"Ray's dashboard", "Ray's monitor", "Ray's idle worker"}
"""The roles that always listen; the others listen later, or not at all."""

_SIGNS = (
    ("ray::RolloutManager", "rollout manager"),
    ("ray::TrainWorker", "trainer"),
    ("ray::EngineWorker", "engine's owner"),
    ("ray::DashboardAgent", "Ray's dashboard agent"),
    ("ray::RuntimeEnvAgent", "Ray's runtime environment agent"),
    ("ray::IDLE", "Ray's idle worker"),
    ("sglang::router", "router"),
    ("sglang_router", "router"),
    ("slime.engine.embedded.server", "engine"),
    ("gcs/gcs_server", "Ray's gcs_server"),
    ("raylet/raylet", "Ray's raylet"),
    ("dashboard/dashboard.py", "Ray's dashboard"),
    ("_private/monitor.py", "Ray's monitor"),
    ("autoscaler/v2/monitor.py", "Ray's monitor"),
    ("default_worker.py", "Ray's idle worker"),
    ("train.py", "driver"),
)


@dataclass(frozen=True)
class Socket:
    """A socket that listens. `role` is one of ROLES, or the command line of a process that is none of them."""

    role: str
    ip: str
    port: int

    @property
    def on_loopback(self) -> bool:
        address = ipaddress.ip_address(self.ip)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def role_of(command: str) -> str:
    return next((role for sign, role in _SIGNS if sign in command), command)


def listening(processes: Iterable[psutil.Process]) -> list[Socket]:
    """Return all sockets of these processes that accept TCP connections, or UDP packets."""
    found: list[Socket] = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            role = role_of(" ".join(process.cmdline()))
            found += [
                Socket(role, connection.laddr.ip, connection.laddr.port)
                for connection in process.net_connections(kind="inet")
                if connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE) and connection.laddr
            ]
    return found


def faults(sockets: Sequence[Socket]) -> list[str]:
    """Return sockets that listen on more than loopback, or whose owner is not in the table of the documentation."""
    text = SECURITY.read_text(encoding="utf-8")
    strangers = {socket.role for socket in sockets if socket.role not in ROLES or f"| {socket.role} |" not in text}
    return [
        *(f"{socket.role} listens on {socket.ip}:{socket.port}" for socket in sockets if not socket.on_loopback),
        *(f"nobody knows of {role}" for role in strangers),
    ]


def answer(port: int, request: str, token: str | None) -> str:
    """Return a status: OK, UNAUTHENTICATED, or whatever else the server answers."""
    header = {} if token is None else {"authorization": f"Bearer {token}"}
    if request.startswith("GET "):
        try:
            asked = urllib.request.Request(f"http://127.0.0.1:{port}{request.removeprefix('GET ')}", headers=header)
            with urllib.request.urlopen(asked, timeout=10) as reply:
                return "OK" if reply.status == 200 else str(reply.status)
        except urllib.error.HTTPError as error:
            return "UNAUTHENTICATED" if error.code in (401, 403) else str(error.code)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary(request)(b"", timeout=10, metadata=tuple(header.items()))
            return "OK"
        except grpc.RpcError as error:
            return str(error.code().name)


def unprotected(sockets: Iterable[Socket], token: str) -> list[str]:
    """Return Ray's servers that accept a request without the token or with a wrong one, or refuse the right one."""
    ports: dict[str, list[int]] = {}
    # gloo's ports, in trainers, never answer; Ray's own show IPv4 addresses as IPv6, and are tried first
    for socket in sorted(sockets, key=lambda socket: ":" not in socket.ip):
        ports.setdefault(socket.role, []).append(socket.port)
    wrong: list[str] = []
    for role, request in ROLES.items():
        if request is None or role not in ports:
            continue
        port = next((port for port in ports[role] if _takes(port, request, token)), None)
        refusals = set() if port is None else {answer(port, request, other) for other in (None, "0" * 64)}
        if refusals != {"UNAUTHENTICATED"}:
            wrong.append(f"{role}: port {port} takes {request} with the token; without it: {refusals}")
    return wrong


def _takes(port: int, request: str, token: str) -> bool:
    return answer(port, request, token) in (("404", "OK") if request.startswith("GET ") else ("OK",))
