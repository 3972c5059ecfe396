"""Speeds of devices, and the source of each number: a flag, a real run, or an estimate from the model and the GPU.

- Used by: `engines` and `trainers` take seconds from here; `report` prints every number with its source.
- Invariant: no number of a simulation comes from anywhere else, so the printed assumptions are complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from slime.config.args import Args
from slime.config.memory import EMBEDDED_RUNNING_REQUESTS
from slime.config.problem import Problem, UsageError
from slime.config.resolve import for_gpus, gpu_memory
from slime.plan.memory_model import engine_memory
from slime.simulate.lengths import Lengths

GPU = "H100"
GPU_FLOPS, GPU_BANDWIDTH, GPU_LINK = 989e12, 3.35e12, 50e9
"""An H100: FLOP/s in bf16 without sparsity, bytes/s of its memory, and bytes/s of a 400 Gbit/s network adapter."""
TRAIN_SHARE, DECODE_SHARE, PREFILL_SHARE, LINK_SHARE = 0.4, 0.6, 0.5, 0.5
"""The shares of these that training, decoding, prefill and the weight sync reach in an estimate."""
STEP_OVERHEAD = 2e-3
"""Seconds of a decode step, apart from reading weights and KV cache, in an estimate."""
STATIC_SHARE = 0.88
"""The share of a GPU that SGLang takes for weights and KV cache in an estimate."""


@dataclass(frozen=True)
class Assumption:
    """One number of a simulation, as it is printed."""

    name: str
    value: str
    source: str


@dataclass(frozen=True)
class EngineSpeed:
    """The speed of one engine: a decode step of B requests takes `step + request_step * B` seconds.

    >>> speed = EngineSpeed(step=0.01, request_step=0.001, prefill_token=1e-4)
    >>> [round(speed.rate(count), 1) for count in (1, 10, 90)]  # tokens/s of each request
    [90.9, 50.0, 10.0]
    >>> round(speed.scaled(2.0).rate(10), 1)  # an engine that takes twice as long
    25.0
    """

    step: float
    request_step: float
    prefill_token: float
    """Seconds of prefill for one token of a prompt."""

    def rate(self, count: int) -> float:
        """Return the tokens/s of each of `count` running requests."""
        return 1.0 / (self.step + self.request_step * count)

    def prefill_seconds(self, tokens: int) -> float:
        return self.prefill_token * tokens

    def scaled(self, factor: float) -> EngineSpeed:
        """Return an engine that takes `factor` times as long for everything."""
        return EngineSpeed(self.step * factor, self.request_step * factor, self.prefill_token * factor)


CPU_SHAPE = EngineSpeed(step=1.0, request_step=1 / 32, prefill_token=1 / 32)
"""The proportions of an embedded engine; a recorded run gives the seconds."""
UNKNOWN = "not known, so 0"


@dataclass(frozen=True)
class Speeds:
    """All numbers of a simulation that are seconds, or give seconds, with the source of each by its field."""

    engine: EngineSpeed
    train_flops: float
    """FLOP/s of one training GPU, by the FLOPs of `core.packing.training_flops`."""
    running_limit: int
    """The most requests that one engine runs at a time."""
    sync: float = 0.0
    """Seconds of one weight sync."""
    save: float = 0.0
    offload: float = 0.0
    """Seconds of each step in which colocated engines and trainers exchange memory."""
    reward: float = 0.0
    """Seconds from the end of a response to its reward."""
    overhead: float = 0.0
    """Seconds of each step that belong to no phase."""
    sources: Mapping[str, str] = field(default_factory=dict[str, str])

    def known(self, source: str, **values: Any) -> Speeds:
        """Return these speeds with other values, which come from `source`."""
        return replace(self, **values, sources={**self.sources, **dict.fromkeys(values, source)})

    def assumptions(self) -> list[Assumption]:
        """Return every number with its unit and its source."""
        engine = self.engine
        alone, most = engine.rate(1), engine.rate(self.running_limit)
        decode = f"{alone:,.1f} tokens/s alone, {most:,.1f} of {self.running_limit:,}"
        prefill = f"{1 / engine.prefill_token:,.0f} tokens/s" if engine.prefill_token else "takes no time"
        rows = [
            ("a request", decode, "engine"),
            ("prefill", prefill, "engine"),
            ("running requests", f"at most {self.running_limit:,} of an engine", "running_limit"),
            ("training", f"{self.train_flops / 1e12:,.4g} TFLOP/s of a GPU", "train_flops"),
        ]
        seconds = {"weight sync": "sync", "checkpoint": "save", "offload": "offload", "reward": "reward"}
        seconds |= {"the rest of a step": "overhead"}
        rows += [(name, f"{vars(self)[key]:,.3g} s", key) for name, key in seconds.items()]
        return [Assumption(name, value, self.sources.get(key, UNKNOWN)) for name, value, key in rows]


def estimated(args: Args, lengths: Lengths) -> Speeds | None:
    """Return the speeds that the model's size and an H100 give; None on a CPU, or if the model is unknown."""
    memory, arch = engine_memory(args), args.architecture
    if memory is None or arch is None or not for_gpus(args):
        return None
    compute = 2 * arch.num_active_parameters() / (args.rollout_num_gpus_per_engine * GPU_FLOPS * PREFILL_SHARE)
    context = lengths.prompt(0) + lengths.mean / 2
    bandwidth = GPU_BANDWIDTH * DECODE_SHARE
    step = STEP_OVERHEAD + memory.weights / bandwidth
    limit, why = _running_limit(args, lengths)
    link = GPU_LINK * LINK_SHARE
    return Speeds(
        engine=EngineSpeed(step, compute + context * memory.token / bandwidth, compute),
        train_flops=GPU_FLOPS * TRAIN_SHARE,
        running_limit=limit,
        sync=2 * arch.num_parameters() / link,
        sources={
            "engine": f"estimate: {GPU}, {DECODE_SHARE:.0%} of bandwidth",
            "train_flops": f"estimate: {TRAIN_SHARE:.0%} of an {GPU}",
            "running_limit": why,
            "sync": f"estimate: weights in bf16 at {link / 1e9:g} GB/s",
        },
    )


def unmeasured(args: Args, lengths: Lengths) -> Speeds:
    """Return speeds whose proportions are right, for `recorded` to scale: the estimate, or those of a CPU."""
    limit, why = _running_limit(args, lengths)
    sources = {"running_limit": why}
    return estimated(args, lengths) or Speeds(CPU_SHAPE, train_flops=1e9, running_limit=limit, sources=sources)


def with_flags(args: Args, speeds: Speeds | None, lengths: Lengths) -> Speeds:
    """Return speeds with those that flags give; `speeds` are the estimate or the measured ones.

    Raises:
        UsageError: nothing is known of the engines' or the trainers' speed.
    """
    alone, most, tflops = args.simulate_request_speed, args.simulate_engine_speed, args.simulate_train_tflops
    if speeds is None:
        for name, value in (("simulate_request_speed", alone), ("simulate_train_tflops", tflops)):
            if value is None:
                raise UsageError([_missing(name)])
        limit, why = _running_limit(args, lengths)
        speeds = Speeds(EngineSpeed(0.0, 0.0, 0.0), 0.0, limit, sources={"running_limit": why})
    engine = speeds.engine
    if alone is not None or most is not None:
        whole = engine.step + engine.request_step if alone is None else 1 / alone
        share = engine.request_step if most is None else 1 / most
        engine = EngineSpeed(max(whole - share, 0.0), min(share, whole), engine.prefill_token)
        names = [flag for flag, value in (("request", alone), ("engine", most)) if value is not None]
        speeds = speeds.known(" and ".join(f"--simulate-{name}-speed" for name in names), engine=engine)
    if args.simulate_prefill_speed is not None:
        engine = EngineSpeed(engine.step, engine.request_step, 1 / args.simulate_prefill_speed)
        source = speeds.sources.get("engine", UNKNOWN)
        speeds = speeds.known(f"{source}; --simulate-prefill-speed", engine=engine)
    if tflops is not None:
        speeds = speeds.known("--simulate-train-tflops", train_flops=1e12 * tflops)
    for name in ("sync", "save", "offload", "reward"):
        seconds = vars(args)[f"simulate_{name}_seconds"]
        if seconds is not None:
            speeds = speeds.known(f"--simulate-{name}-seconds", **{name: seconds})
    return speeds


def _missing(name: str) -> Problem:
    return Problem(
        severity="error",
        where=f"--{name.replace('_', '-')}",
        value="(not given)",
        rule="nothing is known of this speed: the plan is for CPUs, or its model is unknown",
        remedy="give it, or --simulate-run with the directory of a real run, or plan for GPUs with --gpu-memory",
    )


def _running_limit(args: Args, lengths: Lengths) -> tuple[int, str]:
    """Return the most running requests of an engine, and why: a flag, or the room for their KV cache."""
    given = args.sglang.get("max_running_requests")
    embedded = EMBEDDED_RUNNING_REQUESTS if args.engine.on_cpu else None
    limits = [(args.sglang_server_concurrency, "--sglang-server-concurrency")]
    if given is not None:
        limits.append((int(given), "--sglang-max-running-requests"))
    elif embedded is not None:
        limits.append((embedded, "the embedded engine's own"))
    size, memory = gpu_memory(args), engine_memory(args)
    if size is not None and memory is not None and not args.engine.on_cpu:
        room = STATIC_SHARE * size * 2**30 - memory.weights
        fits = int(room / (memory.token * (lengths.prompt(0) + lengths.mean)))
        limits.append((max(fits, 1), f"KV cache of mean length in {STATIC_SHARE:.0%} of {size:g} GiB"))
    return min(limits)
