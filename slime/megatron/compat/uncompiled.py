"""Keep megatron-core's `jit_fuser` from loading torch's compiler on a CPU: it returns functions unchanged.

- Used by: `slime.megatron` installs this before anything imports megatron.core.
- Invariant: with CUDA nothing changes.

On a CPU the decorated functions run uncompiled in any case (see `cpu_layer.install`). But decorating them with
`torch.compile` loads 800 modules, which takes a fifth of a trainer's start and 40 MB.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from slime.config.resolve import cuda_available

NAME = "megatron.core.jit"


def _unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def leave_uncompiled_on_cpu() -> None:
    """Replace the module megatron.core.jit, unless CUDA is available or the module has been imported."""
    if NAME in sys.modules or cuda_available():
        return
    module: Any = ModuleType(NAME, "slime.megatron.compat.uncompiled has put it here")
    module.jit_fuser = module.noop_decorator = _unchanged
    module.enable_jit_fuser = module.disable_jit_fuser = lambda: None
    sys.modules[NAME] = module
