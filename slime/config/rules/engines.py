"""Rules about engines and routers, ours or running already, and about the way that weights take to them.

Path: part of `rules`. Invariant: whether a URL answers is asked later; here it has to be one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from slime.config.api_keys import FORMAT, control_key, key_fault
from slime.config.args import Args
from slime.config.resolve import cuda_available, joins_ray
from slime.config.rules.case import Case
from slime.config.rules.problem import Problem, show
from slime.config.secrets import masked
from slime.core.address import is_loopback

FP32_RULE = "SGLang's kernels on CUDA compute in 16 bits, and its engines are asked for fp32"
FP32_REMEDY = "add --bf16, or --sglang-dtype bfloat16 to train in fp32 what is sampled in bf16"
_URL = re.compile(r"http://(\[[0-9a-fA-F:.]+\]|[^\s/:@\[\]]+):(\d{1,5})")


def starts_engines(args: Args) -> bool:
    """Whether engines are ours."""
    return args.num_engines > 0 and not args.rollout_external_engines


def engines(case: Case) -> Iterable[Problem]:
    """How many engines there are, and that there are some where something is generated."""
    args = case.args
    if args.rollout_external_engines:
        return
    if args.colocate and "rollout_num_gpus" in case.given:
        yield case.error(
            "rollout_num_gpus",
            "--colocate shares the training GPUs with the engines",
            "remove --rollout-num-gpus",
            beside=["colocate"],
        )
    elif args.rollout_num_gpus is None:
        remedy = "say how many, or --colocate, or 0 for a run that generates nothing"
        yield case.error("rollout_num_gpus", "not given", remedy, beside=["colocate"])
    elif args.colocate and args.rollout_num_gpus % args.rollout_num_gpus_per_engine:
        rule = f"does not divide the {args.actor_world_size} training GPUs, which --colocate shares with the engines"
        about = ("colocate", "actor_num_nodes", "actor_num_gpus_per_node")
        yield case.error("rollout_num_gpus_per_engine", rule, "choose a divisor", beside=about)
    elif args.rollout_num_gpus % args.rollout_num_gpus_per_engine:
        rule = f"is no multiple of --rollout-num-gpus-per-engine {args.rollout_num_gpus_per_engine}"
        yield case.error("rollout_num_gpus", rule, "make it one", beside=["rollout_num_gpus_per_engine", "colocate"])
    elif args.rollout_num_gpus == 0 and case.generates:
        yield case.error("rollout_num_gpus", "no engine, but rollouts are generated", "give it at least one")
    elif args.rollout_num_gpus == 0 and case.evaluates and not args.debug_train_only:
        remedy = "give it at least one, or leave out the evaluation data"
        yield case.error("rollout_num_gpus", "no engine, but evaluation generates", remedy)


def sglang(case: Case) -> Iterable[Problem]:
    """SGLang is started on GPUs, and its ranks take part in weight updates by their tensor-parallel numbers."""
    args = case.args
    asked = args.rollout_engine == "sglang" and starts_engines(args)
    if asked and case.real and not (cuda_available() or joins_ray()):
        rule = "SGLang needs a GPU, and this machine has none that torch can use"
        yield case.error("rollout_engine", rule, "add --rollout-engine embedded (--dry-run plans with it)")
    if (args.sglang.get("pp_size") or 1) > 1:
        yield Problem(
            severity="error",
            where="--sglang-pp-size",
            value=str(args.sglang["pp_size"]),
            rule="an engine is one tensor-parallel group, to which weights are sent",
            remedy="leave it out, and raise --rollout-num-gpus-per-engine",
        )


def engine_share(case: Case) -> Iterable[Problem]:
    """SGLang's share of a GPU leaves something of it."""
    share = case.args.sglang.get("mem_fraction_static")
    if share is not None and not 0 < share < 1:
        yield Problem(
            severity="error",
            where="--sglang-mem-fraction-static",
            value=show(share),
            rule="is no share of a GPU that an engine could take",
            remedy="say a number above 0 and below 1, such as 0.7",
        )


def computes_in_fp32(args: Args) -> bool:
    """Whether engines that are SGLang would be asked for fp32, which their kernels on CUDA do not have."""
    dtype = args.sglang.get("dtype") or ("bfloat16" if args.bf16 else "float32")
    return starts_engines(args) and dtype in ("float", "float32")


def sglang_precision(case: Case) -> Iterable[Problem]:
    """SGLang 0.5.16's RMSNorm stops at the first request in fp32."""
    if case.args.rollout_engine == "sglang" and computes_in_fp32(case.args):
        about = ("bf16",) if "dtype" not in case.args.sglang else ()
        yield case.error("rollout_engine", FP32_RULE, FP32_REMEDY, beside=about)


def precision_elsewhere(case: Case) -> Iterable[Problem]:
    """Unset, --bf16 goes by the machine that starts the run, which may be a cluster's one without GPUs."""
    if "bf16" not in case.given and joins_ray() and not cuda_available():
        rule = "this machine has no CUDA, so the run is in fp32, on GPUs of Ray's cluster, too"
        yield case.warning("bf16", rule, "say --bf16 or --no-bf16")


def external_engines(case: Case) -> Iterable[Problem]:
    """--rollout-external-engines: whole URLs, each once, and no other number of engines beside them."""
    args = case.args
    urls = args.rollout_external_engines
    if not urls:
        return
    for url in urls:
        if not _is_url(url):
            rule = f"{masked('url', url)} is no engine's URL"
            yield case.error("rollout_external_engines", rule, "write http://HOST:PORT")
    twice = sorted({url for url in urls if urls.count(url) > 1})
    if twice:
        yield case.error("rollout_external_engines", f"{', '.join(twice)} comes twice", "name each engine once")
    if args.colocate:
        rule = "--colocate shares the training GPUs with engines that the run starts"
        yield case.error("rollout_external_engines", rule, "leave one of the two out", beside=["colocate"])
    wanted = len(urls) * args.rollout_num_gpus_per_engine
    if args.rollout_num_gpus not in (None, wanted) and not args.debug_train_only:
        rule = f"--rollout-external-engines names {len(urls)}, which is {wanted} with --rollout-num-gpus-per-engine"
        about = ("rollout_external_engines", "rollout_num_gpus_per_engine")
        yield case.error("rollout_num_gpus", rule, "leave it out", beside=about)


SLOW_TOKENS_PER_S = 20.0
"""Tokens/s of one response that a loaded engine may well come to."""


def router_request_timeout(case: Case) -> Iterable[Problem]:
    """The longest response comes in time: the router's own timeout cuts responses off that still make progress."""
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
            f"{seconds} s limit a whole response, and one of {flag} {longest} is cut off below "
            f"{longest / seconds:.1f} tokens/s"
        )
        remedy = "leave it out: --engine-request-timeout limits the time without progress"
        yield Problem(severity="warning", where="--router-request-timeout-secs", rule=rule, remedy=remedy)


def external_router(case: Case) -> Iterable[Problem]:
    args = case.args
    if (args.sglang_router_ip is None) != (args.sglang_router_port is None):
        given = "sglang_router_port" if args.sglang_router_ip is None else "sglang_router_ip"
        remedy = "give both --sglang-router-ip and --sglang-router-port"
        yield case.error(given, "half of an address", remedy, beside=["sglang_router_ip", "sglang_router_port"])


def api_keys(case: Case) -> Iterable[Problem]:
    """Keys can be sent, the router's have its format, and one of them opens the list of a router that runs already."""
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
            yield Problem(severity="error", where=where, rule=rule, remedy=f"write {FORMAT}, as run:Trainer:admin:KEY")
    if args.sglang_router_ip is not None and roles and "admin" not in roles and len(roles) == len(texts):
        rule = "no key has the role admin, without which nobody can register engines at the router that runs already"
        yield Problem(severity="error", where=where, rule=rule, remedy="add one of that router's, ID:NAME:admin:KEY")


def takes_keys(args: Args) -> bool:
    """Whether the run's engines can have an API key: SGLang takes none with several tokenizer workers."""
    return args.rollout_engine == "embedded" or (args.sglang.get("tokenizer_worker_num") or 1) == 1


def keyless_engines(case: Case) -> Iterable[Problem]:
    """Engines that take no key are open to every user who reaches them."""
    args = case.args
    if not starts_engines(args) or takes_keys(args):
        return
    given = args.sglang.get("api_key") is not None
    rule = "SGLang takes no API key with several tokenizer workers, "
    rule += "and --sglang-api-key gives one" if given else "so whoever reaches an engine can change its weights"
    yield Problem(
        severity="error" if given else "warning",
        where="--sglang-tokenizer-worker-num",
        value=str(args.sglang["tokenizer_worker_num"]),
        rule=rule,
        remedy="leave one of the two out" if given else "leave it out, or keep other users off these machines",
    )


def pauses(case: Case) -> Iterable[Problem]:
    """Requests that wait while weights change must find no cache of the old ones; SGLang cannot flush it then."""
    args = case.args
    waits = args.update_weight_pause in ("in_place", "retract") and args.num_engines and not args.colocate
    may_be_sglang = args.rollout_engine != "embedded"
    if waits and may_be_sglang and not args.sglang.get("disable_radix_cache"):
        rule = "SGLang flushes its prefix cache only while no request waits, and prompts would be read from the old one"
        yield case.error("update_weight_pause", rule, "add --sglang-disable-radix-cache, or take drain or abort")


def weight_directory(case: Case) -> Iterable[Problem]:
    """Engines elsewhere read files only in a place that is named, or beside the checkpoints."""
    args = case.args
    by_disk = args.update_weight_transport == "disk"
    if args.colocate and args.update_weight_transport != "auto":
        rule = "with --colocate weights go through device memory"
        yield case.error("update_weight_transport", rule, "leave it out", beside=["colocate"])
    given = args.save is not None or "update_weight_disk_dir" in case.given
    elsewhere = [
        url for url in args.rollout_external_engines if _is_url(url) and not is_loopback(urlsplit(url).hostname or "")
    ]
    if elsewhere and not given and needs_weight_directory(args):
        rule = f"neither it nor --save was given, and {elsewhere[0]} has to read files there"
        remedy = "name a directory that it can read under the same path"
        if not by_disk:
            remedy += ", or add --no-check-weight-sync"
        about = ("save", "rollout_external_engines", "update_weight_transport", "check_weight_sync")
        yield case.error("update_weight_disk_dir", rule, remedy, beside=about)


def needs_weight_directory(args: Args) -> bool:
    """Whether weights stand in files on their way, or in those of the sync's proof."""
    sends = bool(args.num_engines) and not args.debug_rollout_only
    return sends and (args.update_weight_transport == "disk" or args.check_weight_sync)


def _is_url(url: str) -> bool:
    match = _URL.fullmatch(url)
    return match is not None and 1 <= int(match[2]) <= 65535
