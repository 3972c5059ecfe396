"""EngineInfo: what an engine reports about itself and its model.

- Used by: `client.describe` makes it; `external` compares an engine that runs already with the flags.
- Invariant: field names of the answers are SGLang's, as in `protocol`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """An engine's report about itself; None means that the engine does not report it."""

    model_path: str
    weight_version: str
    weights_complete: bool
    """Whether the weights are whole: the engine is not in the middle of a set that was never completed."""
    num_ranks: int
    """The number of members that the engine brings into a weight group."""
    dtype: str | None
    context_length: int | None
    model_type: str | None
    """The model type as in config.json."""
    architecture: Mapping[str, Any] | None
    """The fields of `core.architecture.Architecture` (only from the embedded engine)."""
    deterministic: bool
    """Whether an answer does not depend on the other requests."""
    returns_routed_experts: bool = False
    """Whether the engine can report the experts of each token."""

    @classmethod
    def from_json(cls, server: Mapping[str, Any], model: Mapping[str, Any]) -> EngineInfo:
        """Build the report from /server_info and /model_info. Raises KeyError if they are not SGLang's."""
        dtype = server.get("dtype")
        return cls(
            model_path=str(model["model_path"]),
            weight_version=str(model["weight_version"]),
            weights_complete=bool(server.get("weights_complete", True)),
            num_ranks=int(server["tp_size"]),
            dtype=None if dtype in (None, "auto") else str(dtype).removeprefix("torch."),
            context_length=server.get("context_length"),
            model_type=model.get("model_type"),
            architecture=model.get("architecture"),
            deterministic=bool(server.get("enable_deterministic_inference", False)),
            returns_routed_experts=bool(server.get("enable_return_routed_experts", False)),
        )
