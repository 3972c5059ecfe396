"""slime: reinforcement-learning post-training of language models with Megatron-core, SGLang and Ray.

These names are what hooks and programs of users import. They are loaded when first used, so that `import slime` loads
nothing. Everything else may move between versions.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slime.core.batch import TrainBatch
    from slime.core.plugins import HOOKS
    from slime.core.sample import Sample, Status
    from slime.rollout.context import RolloutContext, RolloutResult
    from slime.rollout.multi_turn import MultiTurnEnv, append_environment, append_messages

__version__ = "0.1.0"

__all__ = [
    "HOOKS",
    "MultiTurnEnv",
    "RolloutContext",
    "RolloutResult",
    "Sample",
    "Status",
    "TrainBatch",
    "__version__",
    "append_environment",
    "append_messages",
]

_MODULES = {
    "HOOKS": "slime.core.plugins",
    "MultiTurnEnv": "slime.rollout.multi_turn",
    "append_environment": "slime.rollout.multi_turn",
    "append_messages": "slime.rollout.multi_turn",
    "RolloutContext": "slime.rollout.context",
    "RolloutResult": "slime.rollout.context",
    "Sample": "slime.core.sample",
    "Status": "slime.core.sample",
    "TrainBatch": "slime.core.batch",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'slime' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
