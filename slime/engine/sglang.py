"""SGLang as an engine: its command line, its environment, and the phases of its start in its log.

- Used by: `launch.launch_engine` starts it with these.
- Invariant: everything that decides a token or its log-prob (model, precision, seed) is set here and not left to
  SGLang's environment.

It listens with its HTTP server on the address that it is given (loopback, unless the router is on another machine). Its
processes use Unix sockets under the temporary directory among themselves. Its ranks meet in a file. With
--sglang-dp-size they meet at a TCP port instead, which torch opens on every interface, as NCCL opens its own ports.
"""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime.config.architecture import config_of, read_hf_config
from slime.config.args import Args
from slime.config.flags.renamed import names_by_version
from slime.config.flags.table import FlagSpec, all_flags, secret_names
from slime.engine.sglang_installed import known_spellings, own_spelling

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


@dataclass(frozen=True)
class SGLangServer:
    """The start of one SGLang: arguments after `-m sglang.launch_server`, and environment."""

    words: tuple[str, ...]
    hidden: tuple[str, ...]
    """More arguments that hold secrets, so they must be on no command line that other users can read."""
    environment: Mapping[str, str]


def sglang_server(
    args: Args, *, index: int, host: str, port: int, gpu_ids: Sequence[str], rendezvous: Path | None
) -> SGLangServer:
    """Return the start of engine number `index` on the GPUs `gpu_ids` (if empty: on those of the environment).

    `rendezvous` is a file that does not exist yet, in which its ranks meet.
    """
    assert args.hf_checkpoint is not None, "launch_engine checks it"
    own: dict[str, Any] = {
        "model_path": args.hf_checkpoint,
        "host": host,
        "port": port,
        "nccl_port": engine_port(host, index, besides=port),
        "tp_size": args.rollout_num_gpus_per_engine,
        "random_seed": args.rollout_seed + index,
        "trust_remote_code": args.hf_trust_remote_code,
        # Without this flag it returns no experts, whatever a request asks for.
        "enable_return_routed_experts": args.use_routing_replay or args.sglang.get("enable_return_routed_experts"),
        "enable_memory_saver": args.colocate and bool(args.offload),
        "json_model_override_args": _overrides(args),
        "skip_server_warmup": True,  # it sends text and asks for no log-probs; `launch` warms up with tokens instead
    }
    defaults: dict[str, Any] = {"dtype": "bfloat16" if args.bf16 else "float32"}
    if args.deterministic:
        # Then its results do not depend on the batch; only in this mode does it use each request's own seed.
        defaults["enable_deterministic_inference"] = True
    secret = secret_names("sglang")
    given = {name: value for name, value in args.sglang.items() if name not in secret}
    hidden = {name: value for name, value in args.sglang.items() if name in secret}
    environment = dict(ENVIRONMENT)
    if gpu_ids:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpu_ids)
    if rendezvous is not None and "dp_size" not in given:
        environment["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{rendezvous}"
    return SGLangServer(tuple(words({**defaults, **given, **own})), tuple(words(hidden, attach=True)), environment)


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
    # Take the spelling that the installed version has, as versions differ.
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
