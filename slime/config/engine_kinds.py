"""The kinds of engines: one row for each choice of --rollout-engine, with the facts that rules and plans need.

- Used by: `Args.engine` reads the run's row. `slime.engine.kinds` finds the file that starts the engine in its row.
- Invariant: rules, plan and placement read these facts and never compare the name of a kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """The facts about one kind of engine. The defaults are those of an engine whose kind is not known yet."""

    label: str
    """The kind as the plan and errors name it."""
    module: str | None = None
    """The dotted path of the module whose `KIND` starts such engines; None: not known yet."""
    on_gpus: bool = False
    """Whether it computes on GPUs, one for each of its ranks."""
    on_cpu: bool = False
    """Whether it is one process on a CPU. Neither this nor `on_gpus` is true while the kind is not known."""
    settings: frozenset[str] | None = None
    """The --sglang-* settings that it reads; None: all of them."""
    fp32_fault: tuple[str, str] | None = None
    """The rule and the remedy if it cannot compute in fp32; None: it can."""
    flushes_while_requests_wait: bool = False
    """Whether it can flush its prefix cache while requests wait."""
    caches_prefixes: bool = True
    """Whether a request is faster on an engine that has computed the beginning of its prompt before."""

    def reads(self, setting: str) -> bool:
        """Return whether an engine of this kind reads the --sglang-* setting."""
        return self.settings is None or setting in self.settings


AUTO, ON_GPUS, ON_CPU = "auto", "sglang", "embedded"
"""--rollout-engine auto becomes ON_GPUS where there are GPUs, and otherwise ON_CPU."""

ENGINE_KINDS: Mapping[str, EngineFacts] = {
    AUTO: EngineFacts(label="SGLang if Ray's cluster has GPUs, otherwise embedded"),
    "sglang": EngineFacts(
        label="SGLang",
        module="slime.engine.kinds.sglang",
        on_gpus=True,
        fp32_fault=(
            "SGLang's kernels on CUDA compute in 16 bits, but its engines would have to run in fp32",
            "add --bf16, or --sglang-dtype bfloat16 to sample in bf16 and train in fp32",
        ),
    ),
    "embedded": EngineFacts(
        label="embedded here; SGLang with CUDA",
        module="slime.engine.kinds.embedded",
        on_cpu=True,
        settings=frozenset(
            [
                "context_length",
                "max_running_requests",
                "max_total_tokens",
                "dtype",
                "enable_deterministic_inference",
                "random_seed",
                "api_key",
                "served_model_name",
                "watchdog_timeout",
            ]
        ),
        flushes_while_requests_wait=True,
        caches_prefixes=False,
    ),
}
