"""A placeholder for W&B that loads the real module when it is used.

- Used by: `slime.megatron` installs it before anything imports megatron.core.
- Invariant: whoever uses the module gets the real one.

megatron-core imports wandb for its inference engine. That import alone would take a third of a trainer's start, and
35 MB in each trainer.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any


class _LoadedWhenUsed(ModuleType):
    """A module that loads itself at its first use.

    importlib's LazyLoader does not help: it loads as soon as `inspect` reads the file names of all modules.
    """

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        if (name.startswith("__") and name != "__path__") or spec is None or spec.loader is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__class__ = ModuleType  # pyright: ignore[reportAttributeAccessIssue]
        self.__path__ = list(spec.submodule_search_locations or ())
        spec.loader.exec_module(self)
        return getattr(self, name)


def load_wandb_when_used() -> None:
    """Put a module into `sys.modules` that loads itself when one of its attributes is first read."""
    spec = None if "wandb" in sys.modules else importlib.util.find_spec("wandb")
    if spec is not None:
        module = importlib.util.module_from_spec(spec)
        module.__class__ = _LoadedWhenUsed
        del module.__path__  # importing a submodule reads it, which has to load the module first
        sys.modules["wandb"] = module
