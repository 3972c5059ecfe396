"""megatron-core's `jit_fuser` on a CPU: functions are left as they are, and torch's compiler is not loaded.

Path: `slime.megatron` puts this in place before anything imports megatron.core. Invariant: where CUDA is, nothing here
changes anything; on a CPU the decorated functions would run uncompiled in any case (see `device.install`), but to
decorate them with `torch.compile` loads 800 modules: a fifth of a trainer's start, and 40 MB of each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from slime.config.resolve import cuda_available

NAME = "megatron.core.jit"


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def leave_uncompiled_on_cpu() -> None:
    """Put a module in the place of megatron.core.jit, unless CUDA is there or that module has been imported."""
    if NAME in sys.modules or cuda_available():
        return
    module: Any = ModuleType(NAME, "slime.megatron.uncompiled has put it here")
    module.jit_fuser = module.noop_decorator = _as_it_is
    module.enable_jit_fuser = module.disable_jit_fuser = lambda: None
    sys.modules[NAME] = module
