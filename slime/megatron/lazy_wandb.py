"""W&B, which megatron-core imports for its inference engine: here it is loaded only where somebody uses it.

Path: `slime.megatron` puts it in place before anything imports megatron.core. Invariant: to whoever does use it, the
module is the real one; the import alone would take a third of a trainer's start, and 35 MB of each.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any


class _LoadedWhenUsed(ModuleType):
    """Not importlib's LazyLoader: that one loads as soon as `inspect` asks all modules for their files."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        if (name.startswith("__") and name != "__path__") or spec is None or spec.loader is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__class__ = ModuleType  # pyright: ignore[reportAttributeAccessIssue]
        self.__path__ = list(spec.submodule_search_locations or ())
        spec.loader.exec_module(self)
        return getattr(self, name)


def load_wandb_when_used() -> None:
    """Put a module into `sys.modules` that loads itself where it is first asked for what it has."""
    spec = None if "wandb" in sys.modules else importlib.util.find_spec("wandb")
    if spec is not None:
        module = importlib.util.module_from_spec(spec)
        module.__class__ = _LoadedWhenUsed
        del module.__path__  # an import of a submodule asks for it, and has to find the module loaded
        sys.modules["wandb"] = module
