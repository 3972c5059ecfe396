"""Start engines and the router with the run's flags, and register engines at the router.

- Called by: `cluster` launches the router, then each engine, waits until they are ready and registers the engines. From
  then on `client` sends requests to the router.
- Invariant: a secret is never on a command line (`keyed`), and a process never outlives its owner (`server_process`).
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from slime.config.args import Args
from slime.config.flags.table import Source, secret_names
from slime.core.threads import THREADS_SLEEP_SOON
from slime.engine.connection import authorization
from slime.engine.keyed import VARIABLE
from slime.engine.keys import NO_KEYS, Keys
from slime.engine.protocol import Endpoint, RouterEndpoint
from slime.engine.server_process import ManagedProcess, find_free_port, open_connection
from slime.engine.sglang import MODULE, PHASES, sglang_server

ROUTER_DEFAULTS: Mapping[str, Any] = {
    "policy": "round_robin",
    "health_check_interval_secs": 2,
    "health_check_timeout_secs": 10,
    "health_failure_threshold": 3,
    "health_success_threshold": 1,
    "worker_startup_check_interval": 1,
    # The circuit breaker counts refused requests (4xx) as failures, and would answer 503 for a healthy engine.
    "disable_circuit_breaker": True,
    "log_level": "warn",
}
"""Settings that differ from the router's own, with which it notices a dead engine only after three minutes."""
ROUTER_REQUEST_TIMEOUT_S = 365 * 24 * 3600
"""The router limits whole responses. The client limits the time without progress instead, whatever their length."""
ROUTER_OWN = ("host", "port", "prometheus_host", "prometheus_port")


def launch_engine(
    args: Args, *, index: int, host: str, port: int, log_path: str | Path, gpu_ids: Sequence[str] = ()
) -> ManagedProcess:
    """Start engine number `index`, for SGLang on `gpu_ids`. This returns at once; `wait_ready` waits."""
    if args.hf_checkpoint is None:
        raise ValueError("--hf-checkpoint is not given; the engine loads its weights from it: name an HF directory")
    launch = _launch_sglang if args.rollout_engine == "sglang" else _launch_embedded
    return launch(args, index=index, host=host, port=port, log_path=Path(log_path), gpu_ids=gpu_ids)


def _launch_sglang(
    args: Args, *, index: int, host: str, port: int, log_path: Path, gpu_ids: Sequence[str]
) -> ManagedProcess:
    directory = tempfile.TemporaryDirectory(prefix="slime-engine-")
    rendezvous = Path(directory.name) / "ranks"
    server = sglang_server(args, index=index, host=host, port=port, gpu_ids=gpu_ids, rendezvous=rendezvous)
    _make_private(log_path)  # SGLang writes all its settings into the log
    command, environment = _server(MODULE, server.hidden)
    return ManagedProcess(
        f"engine {index}",
        [*command, *server.words],
        url=f"http://{host}:{port}",
        log_path=log_path,
        environment={**environment, **server.environment, "OMP_NUM_THREADS": str(args.cpu_threads_per_process or 1)},
        phases=PHASES,
        directory=directory,
    )


def _make_private(path: Path) -> None:
    """Make a file that no other user can read, whether it exists or not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.chmod(0o600)


def warm_up(args: Args, process: ManagedProcess, timeout: float) -> None:
    """Let an SGLang that is ready sample a few tokens, because it compiles kernels on its first request.

    Raises:
            RuntimeError: it failed; the error has the end of its log.
    """
    params = {"max_new_tokens": 4, "temperature": 1.0, "ignore_eos": True}
    body = {"input_ids": [1, 2, 3], "sampling_params": params, "return_logprob": True}
    try:
        status, answer = ask(
            process.url, "POST", body, path=Endpoint.GENERATE, api_key=args.sglang.get("api_key"), timeout=timeout
        )
    except (OSError, http.client.HTTPException) as error:
        status, answer = 0, {"message": repr(error)}
    if status != 200:
        raise RuntimeError(f"{process.name} failed at its first request ({status}: {answer}){process.log_tail()}")


def _launch_embedded(
    args: Args, *, index: int, host: str, port: int, log_path: Path, gpu_ids: Sequence[str]
) -> ManagedProcess:
    assert args.hf_checkpoint is not None, "launch_engine checks it"
    assert not gpu_ids, "it computes on the CPU"
    settings: dict[str, Any] = {
        "random_seed": args.rollout_seed + index,
        "dtype": "bfloat16" if args.bf16 else "float32",  # the trainer's dtype: the engine samples what it trains
        "enable_deterministic_inference": args.deterministic,
        "enable_return_routed_experts": args.use_routing_replay,
        **{name: value for name, value in args.sglang.items() if args.engine.reads(name)},
    }
    threads = args.cpu_threads_per_process or 1
    command, environment = _server("slime.engine.embedded.server", _take_hidden(settings, "sglang"))
    command += ["--model-path", args.hf_checkpoint, "--host", host, "--port", str(port)]
    command += ["--num-threads", str(threads), "--dist-timeout", str(args.train_timeout)]
    if args.architecture is not None:
        command += ["--architecture", json.dumps(asdict(args.architecture))]
    command += _flags(settings)
    environment |= {"OMP_NUM_THREADS": str(threads), **THREADS_SLEEP_SOON, "CUDA_VISIBLE_DEVICES": ""}
    return ManagedProcess(
        f"engine {index}", command, url=f"http://{host}:{port}", log_path=log_path, environment=environment
    )


def launch_router(args: Args, *, host: str, port: int, log_path: str | Path) -> ManagedProcess:
    """Start sglang-router with the --router-* flags. This returns at once; `wait_ready` waits."""
    given = {name: value for name, value in args.router.items() if name not in ROUTER_OWN}
    settings = {
        **ROUTER_DEFAULTS,
        "request_timeout_secs": ROUTER_REQUEST_TIMEOUT_S,
        **given,
        "host": host,
        "port": port,
        "prometheus_host": host,  # its own default is every interface
        "prometheus_port": find_free_port(host),
    }
    command, environment = _server("sglang_router.launch_router", _take_hidden(settings, "router"))
    return ManagedProcess(
        "router",
        [*command, *_flags(settings)],
        url=f"http://{host}:{port}",
        log_path=log_path,
        environment=environment,
    )


def _server(module: str, hidden: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs `module`, and its environment, which holds the `hidden` flags for its user alone."""
    environment = {"PYTHONPATH": _import_path()}
    if not hidden:
        return [sys.executable, "-m", module], environment
    return [sys.executable, "-m", "slime.engine.keyed", module], {**environment, VARIABLE: json.dumps(hidden)}


def _take_hidden(settings: dict[str, Any], source: Source) -> list[str]:
    """Remove the secret flags of `source` from `settings`, and return them as words of a command line."""
    taken = {name: settings.pop(name) for name in secret_names(source) & settings.keys()}
    return _flags({name: value for name, value in taken.items() if value}, attach=True)


def register_worker(
    router_url: str,
    worker_url: str,
    *,
    keys: Keys = NO_KEYS,
    timeout: float = 60.0,
    labels: Mapping[str, str] | None = None,
) -> None:
    """Add an engine to the router, with the engine's key, and wait until it is listed as healthy.

    Raises:
        RuntimeError: the router refused it, or did not list it within `timeout` seconds.
    """
    given = {"url": worker_url, "api_key": keys.engine, "labels": labels}
    body = {name: value for name, value in given.items() if value is not None}
    status, answer = ask(router_url, "POST", body, api_key=keys.control)
    if status not in (200, 202):
        raise RuntimeError(f"the router at {router_url} refused {worker_url} {refusal(status, answer)}")
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        _, answer = ask(router_url, "GET", api_key=keys.control)
        if any(w["url"] == worker_url and w["is_healthy"] for w in answer.get("workers", [])):
            return
        time.sleep(0.05)
    raise RuntimeError(
        f"the router at {router_url} did not list {worker_url} as healthy within {timeout:g} s: {answer}"
    )


def refusal(status: int, answer: Mapping[str, Any]) -> str:
    """Return a router's refusal as an error message, with the remedy if it requires another key."""
    remedy = "; give the run an admin key of that router: --router-control-plane-api-keys ID:NAME:admin:KEY"
    return f"({status}): {answer.get('message') or answer}{remedy if status in (401, 403) else ''}"


def ask(
    router_url: str,
    method: str,
    body: object = None,
    *,
    path: str = RouterEndpoint.WORKERS,
    api_key: str | None = None,
    timeout: float = 10.0,
) -> tuple[int, dict[str, Any]]:
    """Send one request to the router; return status and answer. Raises OSError if there is no connection."""
    connection = open_connection(router_url, timeout)
    headers = {"Content-Type": "application/json", **authorization(api_key)}
    try:
        connection.request(method, path, json.dumps(body) if body else None, headers)
        answer = connection.getresponse()
        raw = answer.read()
        try:
            return answer.status, json.loads(raw)
        except json.JSONDecodeError:
            return answer.status, {"message": raw.decode(errors="replace")}
    finally:
        connection.close()


def _flags(settings: Mapping[str, Any], *, attach: bool = False) -> list[str]:
    """Convert {"a_b": 1, "c": True, "d": [1, 2]} to --a-b 1 --c --d 1 2; None and False are left out.

    `attach` writes --a-b=1, which also allows a value that starts with a dash.
    """
    words: list[str] = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        spelling = f"--{name.replace('_', '-')}"
        if isinstance(value, list | tuple):
            words += [spelling, *map(str, cast(Sequence[Any], value))]
        elif value is True:
            words.append(spelling)
        else:
            words += [f"{spelling}={value}"] if attach else [spelling, str(value)]
    return words


def _import_path() -> str:
    """Return a PYTHONPATH with which a child process finds this package, wherever it was started from."""
    own = str(Path(__file__).resolve().parents[2])
    rest = os.environ.get("PYTHONPATH")
    return own if not rest else f"{own}{os.pathsep}{rest}"
