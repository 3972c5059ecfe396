"""SGLang's flags that were renamed or removed before the version whose table is checked in.

- Used by: `parse`, which reads an old name as the new one, and `engine.kinds.sglang`, which passes on the name that the
  installed version has.
- Invariant: old names are written only here. A flag that is given under both names is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from slime.config.flags.table import FlagSpec

TABLE_VERSION = "0.5.21"


@dataclass(frozen=True)
class NewName:
    """The current name of an old flag."""

    flag: str
    value: str | None = None
    """If not None, the old flag was a switch and means this value of the new flag."""
    values: Mapping[str, str] = field(default_factory=dict[str, str])
    """Values that were renamed as well: old -> new."""


_SPLITS = {"in-seq-split": "zigzag", "round-robin-split": "interleave"}
_CUDA_GRAPHS = "--sglang-cuda-graph-backend-prefill"

RENAMED: Mapping[str, NewName] = MappingProxyType(
    {
        "--sglang-cuda-graph-bs": NewName("--sglang-cuda-graph-bs-decode"),
        "--sglang-cuda-graph-max-bs": NewName("--sglang-cuda-graph-max-bs-decode"),
        "--sglang-piecewise-cuda-graph-tokens": NewName("--sglang-cuda-graph-bs-prefill"),
        "--sglang-piecewise-cuda-graph-max-tokens": NewName("--sglang-cuda-graph-max-bs-prefill"),
        "--sglang-piecewise-cuda-graph-compiler": NewName("--sglang-cuda-graph-tc-compiler"),
        "--sglang-enable-breakable-cuda-graph": NewName(_CUDA_GRAPHS, value="breakable"),
        "--sglang-disable-piecewise-cuda-graph": NewName(_CUDA_GRAPHS, value="disabled"),
        "--sglang-enforce-piecewise-cuda-graph": NewName(_CUDA_GRAPHS, value="tc_piecewise"),
        "--sglang-dsa-prefill-cp-mode": NewName("--sglang-cp-strategy", values=_SPLITS),
        "--sglang-nsa-prefill-cp-mode": NewName("--sglang-cp-strategy", values=_SPLITS),
        "--sglang-prefill-cp-mode": NewName("--sglang-cp-strategy", values=_SPLITS),
        "--sglang-enable-dsa-prefill-context-parallel": NewName("--sglang-enable-prefill-cp"),
        "--sglang-enable-nsa-prefill-context-parallel": NewName("--sglang-enable-prefill-cp"),
        "--sglang-enable-prefill-context-parallel": NewName("--sglang-enable-prefill-cp"),
        "--sglang-nsa-prefill-backend": NewName("--sglang-dsa-prefill-backend"),
        "--sglang-nsa-decode-backend": NewName("--sglang-dsa-decode-backend"),
        "--sglang-mamba-scheduler-strategy": NewName("--sglang-mamba-radix-cache-strategy"),
        "--sglang-speculative-dflash-draft-window-size": NewName("--sglang-speculative-draft-window-size"),
        "--sglang-stream-output": NewName("--sglang-incremental-streaming-output"),
        "--sglang-elastic-ep-rejoin": NewName("--sglang-elastic-ep-join-mode", value="recover"),
        "--sglang-keep-mm-feature-on-device": NewName("--sglang-mm-feature-transport", value="cuda_ipc"),
        "--sglang-enable-gdn-replayssm-spec": NewName("--sglang-enable-linear-replayssm-spec"),
    }
)
"""Map from old name to new name, with the values from SGLang's own deprecation notes."""

REMOVED: Mapping[str, str] = MappingProxyType(
    {
        "--sglang-torchao-config": "quantize with --sglang-quantization, or leave it out",
        "--sglang-enable-expert-distribution-metrics": "use --sglang-expert-balancedness-report-mode prometheus",
        "--sglang-collect-tokens-histogram": "--sglang-enable-metrics collects it; leave it out",
        "--sglang-prefill-round-robin-balance": "it no longer had an effect; leave it out",
    }
)
"""Flags of SGLang 0.5.16 that were removed without a new name, and what to do instead."""


def names_by_version(spec: FlagSpec) -> tuple[str, ...]:
    """Return the flag's spellings, followed by the older names that take the same value."""
    older = [old for old, new in RENAMED.items() if new.flag in spec.on and new == NewName(new.flag)]
    return (*spec.on, *older)
