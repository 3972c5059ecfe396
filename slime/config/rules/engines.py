"""Rules for engines and routers, whether the run starts them or not, and for the weight sync to them.

- Used by: `rules.check`.
- Invariant: no URL is contacted here; a URL only has to be well-formed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from slime.config.api_keys import FORMAT, control_key, key_fault
from slime.config.problem import Problem, show
from slime.config.resolve import cuda_available, cuda_devices, joins_ray
from slime.config.rules.case import Case
from slime.config.secrets import masked
from slime.config.weight_transports import AUTO as AUTO_TRANSPORT
from slime.core.address import is_loopback

_URL = re.compile(r"http://(\[[0-9a-fA-F:.]+\]|[^\s/:@\[\]]+):(\d{1,5})")


def engines(case: Case) -> Iterable[Problem]:
    """Check the number of engines, and that there is at least one if the run generates."""
    args = case.args
    if args.rollout_external_engines:
        return
    if args.colocate and "rollout_num_gpus" in case.given:
        rule = f"--colocate shares the {args.actor_world_size} training GPUs with the engines"
        if (args.rollout_num_gpus or 0) > args.actor_world_size:
            rule += ", and engines on further GPUs are not part of this version"
        remedy = "append --no-rollout-num-gpus, which takes it back, or --no-colocate"
        yield case.error("rollout_num_gpus", rule, remedy, also=["colocate"])
    elif args.rollout_num_gpus is None:
        yield _no_place(case)
    elif args.colocate and args.rollout_num_gpus % args.rollout_num_gpus_per_engine:
        rule = f"does not divide the {args.actor_world_size} training GPUs, which --colocate shares with the engines"
        about = ("colocate", "actor_num_nodes", "actor_num_gpus_per_node")
        yield case.error("rollout_num_gpus_per_engine", rule, "choose a divisor", also=about)
    elif args.rollout_num_gpus % args.rollout_num_gpus_per_engine:
        rule = f"is not a multiple of --rollout-num-gpus-per-engine {args.rollout_num_gpus_per_engine}"
        yield case.error(
            "rollout_num_gpus", rule, "make it a multiple", also=["rollout_num_gpus_per_engine", "colocate"]
        )
    elif args.rollout_num_gpus == 0 and case.generates:
        yield case.error("rollout_num_gpus", "no engine, but rollouts are generated", "make it at least 1")
    elif args.rollout_num_gpus == 0 and case.evaluates and not (args.debug_train_only or args.validates):
        remedy = "make it at least 1, or leave out the evaluation data"
        yield case.error("rollout_num_gpus", "no engine, but evaluation generates", remedy)


def _no_place(case: Case) -> Problem:
    """Return the error of a run that says neither how many GPUs generate nor that they are shared."""
    if case.args.rollouts_ahead:
        rule, remedy = "not given, and train_async.py needs engines on devices of their own", "give their number"
    elif "colocate" in case.given:
        rule, remedy = "not given, with --no-colocate", "give their number, or 0 for a run that generates nothing"
    else:
        rule = f"not given, nor --colocate, and this machine has {cuda_devices()} GPUs"
        remedy = "add --colocate to share the training GPUs, or give the number of GPUs for generation"
    return case.error("rollout_num_gpus", rule, remedy, also=["colocate"])


def sglang(case: Case) -> Iterable[Problem]:
    """Refuse SGLang without a GPU, and pipeline parallelism: the weight sync numbers ranks by tensor parallelism."""
    args = case.args
    asked = args.engine.on_gpus and args.starts_engines
    if asked and case.real and not (cuda_available() or joins_ray()):
        rule = f"{args.engine.label} needs a GPU, and this machine has none that torch can use"
        yield case.error("rollout_engine", rule, "add --rollout-engine embedded (--dry-run plans with it)")
    if (args.sglang.get("pp_size") or 1) > 1:
        yield Problem(
            severity="error",
            where="--sglang-pp-size",
            value=str(args.sglang["pp_size"]),
            rule="an engine must be one tensor-parallel group, because the weight sync sends to such a group",
            remedy="leave it out, and raise --rollout-num-gpus-per-engine",
        )


def engine_share(case: Case) -> Iterable[Problem]:
    """Check that SGLang's fraction of GPU memory lies between 0 and 1."""
    share = case.args.sglang.get("mem_fraction_static")
    if share is not None and not 0 < share < 1:
        yield Problem(
            severity="error",
            where="--sglang-mem-fraction-static",
            value=show(share),
            rule="is not a fraction of a GPU's memory",
            remedy="give a number above 0 and below 1, such as 0.7",
        )


def sglang_precision(case: Case) -> Iterable[Problem]:
    """Refuse fp32 with SGLang; in version 0.5.16, RMSNorm fails at the first request in fp32."""
    if case.args.fp32_fault is not None:
        rule, remedy = case.args.fp32_fault
        about = ("bf16",) if "dtype" not in case.args.sglang else ()
        yield case.error("rollout_engine", rule, remedy, also=about)


def precision_elsewhere(case: Case) -> Iterable[Problem]:
    """Warn when --bf16 is unset on a machine without GPUs that joins a cluster; its default would be decided here."""
    if "bf16" not in case.given and joins_ray() and not cuda_available():
        rule = "this machine has no CUDA, so the run computes in fp32, even on GPUs of Ray's cluster"
        yield case.warning("bf16", rule, "give --bf16 or --no-bf16")


def external_engines(case: Case) -> Iterable[Problem]:
    """Check --rollout-external-engines: complete URLs, each once, and no contradicting number of engines."""
    args = case.args
    urls = args.rollout_external_engines
    if not urls:
        return
    for url in urls:
        if not _is_url(url):
            rule = f"{masked('url', url)} is not an engine's URL"
            yield case.error("rollout_external_engines", rule, "write http://HOST:PORT")
    twice = sorted({url for url in urls if urls.count(url) > 1})
    if twice:
        yield case.error("rollout_external_engines", f"{', '.join(twice)} is given twice", "name each engine once")
    if args.colocate:
        rule = "--colocate shares the training GPUs with engines that the run starts"
        yield case.error("rollout_external_engines", rule, "leave one of the two out", also=["colocate"])
    wanted = len(urls) * args.rollout_num_gpus_per_engine
    if args.rollout_num_gpus not in (None, wanted) and not args.debug_train_only:
        rule = (
            f"--rollout-external-engines names {len(urls)} engines, which have {wanted} GPUs with "
            "--rollout-num-gpus-per-engine"
        )
        about = ("rollout_external_engines", "rollout_num_gpus_per_engine")
        yield case.error("rollout_num_gpus", rule, "leave it out", also=about)


SLOW_TOKENS_PER_S = 20.0
"""A speed in tokens/s per response that a loaded engine may fall to."""


def router_request_timeout(case: Case) -> Iterable[Problem]:
    """Warn if the router's own timeout would cut off a long response that still makes progress."""
    args = case.args
    seconds = args.router.get("request_timeout_secs")
    if seconds is None or args.sglang_router_ip is not None:
        return
    flag, longest = max(
        ("--rollout-max-response-len", args.rollout_max_response_len or 0),
        ("--eval-max-response-len", args.eval_max_response_len or 0),
        key=lambda pair: pair[1],
    )
    if longest > seconds * SLOW_TOKENS_PER_S:
        rule = (
            f"{seconds} s limit a whole response, and one of {flag} {longest} is cut off if it is slower than "
            f"{longest / seconds:.1f} tokens/s"
        )
        remedy = "leave it out: --engine-request-timeout limits the time without progress"
        yield Problem(severity="warning", where="--router-request-timeout-secs", rule=rule, remedy=remedy)


def external_router(case: Case) -> Iterable[Problem]:
    """Check that address and port of a router are given together."""
    args = case.args
    if (args.sglang_router_ip is None) != (args.sglang_router_port is None):
        given = "sglang_router_port" if args.sglang_router_ip is None else "sglang_router_ip"
        remedy = "give both --sglang-router-ip and --sglang-router-port"
        yield case.error(given, "is half of an address", remedy, also=["sglang_router_ip", "sglang_router_port"])


def api_keys(case: Case) -> Iterable[Problem]:
    """Check that keys can be sent, have the router's format, and can register engines at a router that already runs."""
    args = case.args
    for where, mapping in (("--sglang-api-key", args.sglang), ("--router-api-key", args.router)):
        key = mapping.get("api_key")
        if key is not None and (fault := key_fault(key)):
            yield Problem(severity="error", where=where, rule=fault, remedy=f"write {where} env:NAME, or another key")
    texts = args.router.get("control_plane_api_keys") or ()
    roles: list[str] = []
    where = "--router-control-plane-api-keys"
    for number, text in enumerate(texts, 1):
        try:
            roles.append(control_key(text).role)
        except ValueError as error:
            rule = f"value {number} of {len(texts)} {error}"
            yield Problem(
                severity="error", where=where, rule=rule, remedy=f"write {FORMAT}, such as run:Trainer:admin:KEY"
            )
    if args.sglang_router_ip is not None and roles and "admin" not in roles and len(roles) == len(texts):
        rule = "no key has the role admin, which is required to register engines at a router that already runs"
        yield Problem(
            severity="error", where=where, rule=rule, remedy="add one of that router's keys, ID:NAME:admin:KEY"
        )


def keyless_engines(case: Case) -> Iterable[Problem]:
    """Warn when engines cannot have a key, because then every user who reaches them can use them."""
    args = case.args
    if not args.starts_engines or args.engines_take_keys:
        return
    given = args.sglang.get("api_key") is not None
    rule = "SGLang accepts no API key with several tokenizer workers, "
    rule += "but --sglang-api-key gives one" if given else "so everyone who reaches an engine can change its weights"
    yield Problem(
        severity="error" if given else "warning",
        where="--sglang-tokenizer-worker-num",
        value=str(args.sglang["tokenizer_worker_num"]),
        rule=rule,
        remedy="leave one of the two out" if given else "leave it out, or keep other users off these machines",
    )


def pauses(case: Case) -> Iterable[Problem]:
    """Refuse pausing modes in which SGLang would reuse cache entries of the old weights.

    With in_place and retract, requests wait while weights change. SGLang cannot flush its prefix cache while requests
    wait, so a prompt after the weight sync could be read from the cache of the old weights.
    """
    args = case.args
    waits = args.update_weight_pause in ("in_place", "retract") and args.num_engines and not args.colocate
    if waits and not args.engine.flushes_while_requests_wait and not args.sglang.get("disable_radix_cache"):
        rule = "SGLang cannot flush its prefix cache while requests wait, so prompts would use the old weights' cache"
        yield case.error("update_weight_pause", rule, "add --sglang-disable-radix-cache, or use drain or abort")


def weight_directory(case: Case) -> Iterable[Problem]:
    """Require a named directory, or --save, if an engine on another machine must read weight files."""
    args = case.args
    by_disk = args.transport_writes_files
    if args.colocate and args.update_weight_transport != AUTO_TRANSPORT:
        rule = "with --colocate weights are passed through device memory"
        yield case.error("update_weight_transport", rule, "leave it out", also=["colocate"])
    given = args.save is not None or "update_weight_disk_dir" in case.given
    elsewhere = [
        url for url in args.rollout_external_engines if _is_url(url) and not is_loopback(urlsplit(url).hostname or "")
    ]
    if elsewhere and not given and args.writes_weight_files:
        rule = f"neither it nor --save was given, and {elsewhere[0]} must read files there"
        remedy = "name a directory that the engine can read under the same path"
        if not by_disk:
            remedy += ", or add --no-check-weight-sync"
        about = ("save", "rollout_external_engines", "update_weight_transport", "check_weight_sync")
        yield case.error("update_weight_disk_dir", rule, remedy, also=about)


def _is_url(url: str) -> bool:
    match = _URL.fullmatch(url)
    return match is not None and 1 <= int(match[2]) <= 65535
