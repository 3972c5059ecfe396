"""SGLang as a kind of engine: what is installed, the command line, the environment, and the phases of its start.

- Used by: `launch`, through the row of `ENGINE_KINDS` that names this file. The driver (if SGLang is installed there)
  and every engine's owner check what is installed before anything is loaded.
- Invariant: everything that decides a token or its log-prob (model, precision, seed) is set here and not left to
  SGLang's environment. SGLang's files are read, never imported: an import takes half a minute and needs a GPU.

Its HTTP server listens on the address that it is given (loopback, unless the router is on another machine). Its
processes talk to each other through Unix sockets in the temporary directory. Its ranks meet in a file. With
--sglang-dp-size they meet at a TCP port instead, which torch opens on every interface, as NCCL opens its own ports.
"""

from __future__ import annotations

import ast
import difflib
import http.client
import importlib.metadata
import importlib.util
import json
import random
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from slime.config.architecture import config_of, read_hf_config
from slime.config.args import Args
from slime.config.flags.renamed import names_by_version
from slime.config.flags.table import FlagSpec, all_flags, secret_names
from slime.engine.command_line import ServerCommand
from slime.engine.kinds.kind import EngineKind, EngineStart
from slime.engine.protocol import Endpoint
from slime.engine.server_process import ManagedProcess, ask

MODULE = "sglang.launch_server"
PHASES: tuple[tuple[str, str], ...] = (
    ("server_args=", "starting its processes"),
    ("Init torch distributed begin", "joining its ranks"),
    ("Init parallel begin", "joining its ranks"),  # from 0.5.21 on
    ("Load weight begin", "loading weights"),
    ("Load weight end", "laying out the KV cache"),
    ("KV Cache is allocated", "preparing kernels"),
    ("graph begin", "capturing CUDA graphs"),
    ("graph end", "opening its server"),
    ("fired up and ready", "ready"),
)
"""A text in SGLang's log, and what SGLang does after it."""
ENVIRONMENT: Mapping[str, str] = {
    # The returned log-probs are those of the distribution that SGLang samples from.
    "SGLANG_RETURN_ORIGINAL_LOGPROB": "0",
    # With its default, /health generates a token, so an engine that is paused or asleep would look dead.
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
}
PORTS = range(12000, 32000)
"""Ports below those that the system hands out itself: an engine opens its own only after half a minute."""
CLASSES = 16
"""The number of engines on one machine whose ports never coincide."""
OLDEST, NEWEST = (0, 5, 16), (0, 5, 23)
"""The oldest and the newest version whose protocol, log lines and flags are known."""
REMEDY = "pip install 'slime[gpu]'"


def command(args: Args, start: EngineStart) -> ServerCommand:
    """Return how to run engine number `start.index`; its ranks meet in a file in `start.directory`.

    Raises:
        ValueError: SGLang has no way to take what --override-hf-config changes.
    """
    own: dict[str, Any] = {
        "model_path": start.model_path,
        "host": start.host,
        "port": start.port,
        "nccl_port": engine_port(start.host, start.index, besides=start.port),
        "tp_size": args.rollout_num_gpus_per_engine,
        "random_seed": args.rollout_seed + start.index,
        "trust_remote_code": args.hf_trust_remote_code,
        # Without this flag it returns no experts, whatever a request asks for.
        "enable_return_routed_experts": args.use_routing_replay or args.sglang.get("enable_return_routed_experts"),
        "enable_memory_saver": args.colocate and bool(args.offload),
        "json_model_override_args": _overrides(args),
        "skip_server_warmup": True,  # it sends text and asks for no log-probs; `warm_up` sends tokens instead
    }
    defaults: dict[str, Any] = {"dtype": "bfloat16" if args.bf16 else "float32"}
    if args.deterministic:
        # Then its results do not depend on the batch; only in this mode does it use each request's own seed.
        defaults["enable_deterministic_inference"] = True
    secret = secret_names("sglang")
    given = {name: value for name, value in args.sglang.items() if name not in secret}
    hidden = {name: value for name, value in args.sglang.items() if name in secret}
    environment = dict(ENVIRONMENT)
    if start.gpu_ids:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(start.gpu_ids)
    if start.directory is not None and "dp_size" not in given:
        environment["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{start.directory / 'ranks'}"
    line = tuple(words({**defaults, **given, **own}))
    return ServerCommand(MODULE, line, tuple(words(hidden, attach=True)), environment)


def words(settings: Mapping[str, Any], *, attach: bool = False) -> list[str]:
    """Convert fields of ServerArgs to words of a command line; None is left out, and False if it has no flag.

    `attach` makes one word `--flag=value`, which also allows a value that starts with a dash.
    """
    table = {spec.name: spec for spec in all_flags() if spec.source == "sglang"}
    known = known_spellings()
    return [word for name, value in settings.items() for word in _words(table[name], value, known, attach=attach)]


def _words(spec: FlagSpec, value: Any, known: frozenset[str], *, attach: bool) -> list[str]:
    if value is None:
        return []
    # Use the spelling of the installed version, because versions differ.
    flag = next((name for name in map(own_spelling, names_by_version(spec)) if name in known), own_spelling(spec.on[0]))
    if spec.kind == "bool" and not spec.num_values:
        if value:
            return [flag]
        return [own_spelling(spec.off[0])] if spec.off else []
    if isinstance(value, list | tuple):
        return [flag, *map(str, value)]
    return [f"{flag}={value}"] if attach else [flag, str(value)]


def _overrides(args: Args) -> str | None:
    """Return the changes of --override-hf-config to config.json, overridden by the user's own --sglang ones."""
    given = args.sglang.get("json_model_override_args")
    if args.architecture is None or not args.override_hf_config or args.hf_checkpoint is None:
        return given
    config = read_hf_config(args.hf_checkpoint)
    meant, unsaid = config_of(args.architecture, config)
    if unsaid:
        raise ValueError(
            f"--override-hf-config {' '.join(unsaid)}: config.json has no key that would pass this to SGLang; "
            "leave it out, or change the checkpoint"
        )
    changed = {name: value for name, value in meant.items() if config.get(name) != value}
    return json.dumps({**changed, **json.loads(given or "{}")}) if changed else given


def engine_port(host: str, index: int, *, besides: int = 0) -> int:
    """Return a port that is free now, and that no other engine of this run will pick."""
    candidates = [port for port in PORTS if port % CLASSES == index % CLASSES and port != besides]
    random.shuffle(candidates)
    for port in candidates:
        try:
            with socket.create_server((host, port)):
                return port
        except OSError:
            continue
    raise RuntimeError(f"no port of {PORTS.start} to {PORTS.stop} is free on {host}; end what occupies them")


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


def installed_version() -> str | None:
    """Return the version of SGLang on this machine, or None if it is not installed."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return None


def check_installed(args: Args) -> str:
    """Return the version of the SGLang that is installed here, after checking that it has every flag of this run.

    Raises:
        ValueError: none is installed, an unknown version, or one that lacks flags; the error lists all such flags.
    """
    version = installed_version()
    spec = importlib.util.find_spec("sglang")
    if version is None or spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"--rollout-engine {args.rollout_engine}: SGLang is not installed here: {REMEDY}, or add "
            "--rollout-engine embedded, a slow engine for a CPU"
        )
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    if not OLDEST <= numbers <= NEWEST:
        known = " to ".join(".".join(map(str, end)) for end in (OLDEST, NEWEST))
        raise ValueError(f"SGLang {version} is installed; versions {known} can be driven: {REMEDY}")
    known = known_spellings()
    problems = list(_unknown(args, version, known))
    if problems:
        raise ValueError("\n".join(problems))
    return version


def _unknown(args: Args, version: str, known: frozenset[str]) -> Iterable[str]:
    spellings = {spec.name: names_by_version(spec) for spec in all_flags() if spec.source == "sglang"}
    for name in args.sglang:
        ours = spellings[name]
        if known.isdisjoint(own_spelling(spelling) for spelling in ours):
            near = difflib.get_close_matches(own_spelling(ours[0]), known, n=1, cutoff=0.6)
            hint = f", the nearest is --sglang-{near[0].removeprefix('--')}" if near else ""
            yield f"{ours[0]}: SGLang {version}, which is installed, has no such flag{hint}; leave it out"


def own_spelling(spelling: str) -> str:
    """Convert --sglang-tp-size to --tp-size, as SGLang spells it."""
    return "--" + spelling.removeprefix("--sglang-")


def known_spellings() -> frozenset[str]:
    """Return every flag of the SGLang that is installed here; empty if none is."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    return installed_spellings(str(Path(next(iter(spec.submodule_search_locations))) / "srt"))


@cache
def installed_spellings(srt: str) -> frozenset[str]:
    """Return every flag of the SGLang whose package sglang.srt is the directory `srt`, in its own spelling."""
    root = Path(srt)
    files = [root / "server_args.py", *sorted((root / "arg_groups").rglob("*.py"))]
    return frozenset(word for file in files if file.is_file() for word in _spellings(ast.parse(file.read_bytes())))


def _spellings(module: ast.Module) -> Iterator[str]:
    """Find flag names in `name: A[type, Arg(cli_name=..., aliases=[...])]` and in add_argument("--name", ...)."""
    for node in ast.walk(module):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield from _of_field(node.target.id, node.annotation)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            yield from (word for word in map(_text, node.args) if word is not None and word.startswith("--"))


def _of_field(name: str, annotation: ast.expr) -> Iterator[str]:
    if not (isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "A"):
        return
    described = annotation.slice.elts[1] if isinstance(annotation.slice, ast.Tuple) else None
    words = {word.arg: word.value for word in described.keywords} if isinstance(described, ast.Call) else {}
    if "no_cli" in words:
        return
    spelled = _text(words["cli_name"]) if "cli_name" in words else None
    yield spelled or "--" + name.replace("_", "-")
    aliases = words.get("aliases")
    if isinstance(aliases, ast.List):
        yield from (word for word in map(_text, aliases.elts) if word is not None)


def _text(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


KIND = EngineKind(
    command=command,
    check=check_installed,
    is_installed=lambda: installed_version() is not None,
    port=engine_port,
    phases=PHASES,
    warm_up=warm_up,
    needs_directory=True,
    logs_secrets=True,
    takes_free_memory=True,
)
