"""SGLang's flags that have another name in the version whose table is checked in, or are gone from it.

Path: `parse` reads an old name as the new one; `engine.sglang` passes on the name that the installed version has.
Invariant: old names are written down here and nowhere else; a flag that is given by both names is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from slime.config.flags.table import FlagSpec

TABLE_VERSION = "0.5.21"


@dataclass(frozen=True)
class NewName:
    """The present name of an old flag."""

    flag: str
    value: str | None = None
    """The old flag was a switch, and means this value of the new one."""
    values: Mapping[str, str] = field(default_factory=dict[str, str])
    """Values that have another name, too: old -> new."""


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
"""Old name -> new name, with the values that SGLang's own deprecation notes give."""

REMOVED: Mapping[str, str] = MappingProxyType(
    {
        "--sglang-torchao-config": "quantize with --sglang-quantization, or leave it out",
        "--sglang-enable-expert-distribution-metrics": "use --sglang-expert-balancedness-report-mode prometheus",
        "--sglang-collect-tokens-histogram": "--sglang-enable-metrics collects it; leave it out",
        "--sglang-prefill-round-robin-balance": "it had no effect any more; leave it out",
    }
)
"""Flags of 0.5.16 that are gone without another name, and what to do instead."""


def names_by_version(spec: FlagSpec) -> tuple[str, ...]:
    """The flag's spellings, then the older ones that take the same value."""
    older = [old for old, new in RENAMED.items() if new.flag in spec.on and new == NewName(new.flag)]
    return (*spec.on, *older)
