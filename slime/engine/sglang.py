"""SGLang as an engine: its command line, its environment, and what its log says of a start.

Path: `launch.launch_engine` starts it with these. Invariant: everything that decides a token or its log-prob (model,
precision, seed) is said here and not left to SGLang's environment.

What it listens on: its HTTP server on the address that it is given (loopback, unless the router stands elsewhere), its
processes among each other on Unix sockets under the temporary directory. Its ranks meet in a file; with
--sglang-dp-size at a TCP port instead, which torch opens on every interface, as NCCL opens its own between ranks.
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
"""What SGLang writes into its log, and what it does from then on."""
ENVIRONMENT: Mapping[str, str] = {
    # The log-probs that it returns are those of the distribution that it samples from.
    "SGLANG_RETURN_ORIGINAL_LOGPROB": "0",
    # Otherwise /health generates a token: an engine that is paused or asleep would be taken for dead.
    "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
}
PORTS = range(12000, 32000)
"""Below those that the system gives away by itself: an engine opens its own only after half a minute."""
CLASSES = 16
"""Engines of one machine whose ports never coincide."""


@dataclass(frozen=True)
class SGLangServer:
    """How one is started: arguments behind `-m sglang.launch_server`, and environment."""

    words: tuple[str, ...]
    hidden: tuple[str, ...]
    """Further words, with secrets, which belong on no command line that other users can read."""
    environment: Mapping[str, str]


def sglang_server(
    args: Args, *, index: int, host: str, port: int, gpu_ids: Sequence[str], rendezvous: Path | None
) -> SGLangServer:
    """Engine number `index` on the GPUs `gpu_ids` (all of the environment's, where there are none).

    `rendezvous`: a file that does not exist yet, at which its ranks meet.
    """
    assert args.hf_checkpoint is not None, "launch_engine asks for it"
    own: dict[str, Any] = {
        "model_path": args.hf_checkpoint,
        "host": host,
        "port": port,
        "nccl_port": engine_port(host, index, besides=port),
        "tp_size": args.rollout_num_gpus_per_engine,
        "random_seed": args.rollout_seed + index,
        "trust_remote_code": args.hf_trust_remote_code,
        # Otherwise it says nothing of experts, whoever asks.
        "enable_return_routed_experts": args.use_routing_replay or args.sglang.get("enable_return_routed_experts"),
        "enable_memory_saver": args.colocate and bool(args.offload),
        "json_model_override_args": _overrides(args),
        "skip_server_warmup": True,  # it sends text, and asks for no log-probs: `launch` warms up with tokens
    }
    defaults: dict[str, Any] = {"dtype": "bfloat16" if args.bf16 else "float32"}
    if args.deterministic:
        # Its results do not depend on the batch then, and only then does it draw by each request's own seed.
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
    """Fields of ServerArgs -> words of its command line; None is left out, and False where no flag says it.

    `attach`: one word `--flag=value`, which may also be a value that starts with a dash.
    """
    table = {spec.name: spec for spec in all_flags() if spec.source == "sglang"}
    known = known_spellings()
    return [word for name, value in settings.items() for word in _words(table[name], value, known, attach=attach)]


def _words(spec: FlagSpec, value: Any, known: frozenset[str], *, attach: bool) -> list[str]:
    if value is None:
        return []
    # The name that the installed version has, where versions differ.
    flag = next((name for name in map(own_spelling, names_by_version(spec)) if name in known), own_spelling(spec.on[0]))
    if spec.kind == "bool" and not spec.num_values:
        if value:
            return [flag]
        return [own_spelling(spec.off[0])] if spec.off else []
    if isinstance(value, list | tuple):
        return [flag, *map(str, value)]
    return [f"{flag}={value}"] if attach else [flag, str(value)]


def _overrides(args: Args) -> str | None:
    """The changes of --override-hf-config in config.json, under the user's own overrides for SGLang."""
    given = args.sglang.get("json_model_override_args")
    if args.architecture is None or not args.override_hf_config or args.hf_checkpoint is None:
        return given
    config = read_hf_config(args.hf_checkpoint)
    meant, unsaid = config_of(args.architecture, config)
    if unsaid:
        raise ValueError(
            f"--override-hf-config {' '.join(unsaid)}: config.json has no key that would tell SGLang; "
            "leave it out, or change the checkpoint"
        )
    changed = {name: value for name, value in meant.items() if config.get(name) != value}
    return json.dumps({**changed, **json.loads(given or "{}")}) if changed else given


def engine_port(host: str, index: int, *, besides: int = 0) -> int:
    """A port that is free now, and that no other engine of this run picks meanwhile."""
    candidates = [port for port in PORTS if port % CLASSES == index % CLASSES and port != besides]
    random.shuffle(candidates)
    for port in candidates:
        try:
            with socket.create_server((host, port)):
                return port
        except OSError:
            continue
    raise RuntimeError(f"no port of {PORTS.start} to {PORTS.stop} is free on {host}; end what occupies them")
