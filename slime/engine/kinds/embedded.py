"""The embedded engine (`slime.engine.embedded`) as a kind: its command line and its environment.

- Used by: `launch`, through the row of `ENGINE_KINDS` that names this file.
- Invariant: it computes on the CPU in the dtype of the trainer, so both have the same policy.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from slime.config.args import Args
from slime.config.engine_kinds import ENGINE_KINDS
from slime.core.threads import THREADS_SLEEP_SOON
from slime.engine.command_line import ServerCommand, flag_words, take_hidden
from slime.engine.kinds.kind import EngineKind, EngineStart


def command(args: Args, start: EngineStart) -> ServerCommand:
    """Return how to run engine number `start.index`: one process with --cpu-threads-per-process threads."""
    settings: dict[str, Any] = {
        "random_seed": args.rollout_seed + start.index,
        "dtype": "bfloat16" if args.bf16 else "float32",
        "enable_deterministic_inference": args.deterministic,
        "enable_return_routed_experts": args.use_routing_replay,
        **{name: value for name, value in args.sglang.items() if ENGINE_KINDS["embedded"].reads(name)},
    }
    threads = args.cpu_threads_per_process or 1
    hidden = take_hidden(settings, "sglang")
    words = ["--model-path", start.model_path, "--host", start.host, "--port", str(start.port)]
    words += ["--num-threads", str(threads), "--dist-timeout", str(args.train_timeout)]
    if args.architecture is not None:
        words += ["--architecture", json.dumps(asdict(args.architecture))]
    return ServerCommand(
        "slime.engine.embedded.server",
        (*words, *flag_words(settings)),
        hidden,
        {**THREADS_SLEEP_SOON, "CUDA_VISIBLE_DEVICES": ""},
    )


KIND = EngineKind(command=command)
