"""Import the parts of Megatron that load experiment trackers, without these trackers.

- Used by: `slime.megatron` calls it before anything else imports megatron.core.
- Invariant: the trackers can be imported as usual afterwards, and one that was imported before stays.

megatron-core imports W&B and TensorBoard for timers and for an inference engine, which this project does not use. That
takes half of a trainer's start and 35 MB in each trainer, and W&B leaves its temporary directories when an actor is
ended. Megatron treats both as optional, so they are hidden while these modules are imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

TRACKERS = ("wandb", "torch.utils.tensorboard")
IMPORT_TRACKERS = ("megatron.core.timers", "megatron.core.inference.contexts.dynamic_context")
"""The modules of megatron-core that import a tracker and that training imports, directly or not."""


@contextmanager
def hidden(*modules: str) -> Iterator[None]:
    """Make imports of `modules` fail inside the block as if they were not installed, unless imported before."""
    names = [name for name in modules if name not in sys.modules]
    for name in names:
        sys.modules[name] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name)


def import_megatron_without_trackers() -> None:
    """Import the modules of Megatron that would load a tracker, while the trackers are hidden."""
    with hidden(*TRACKERS):
        for name in IMPORT_TRACKERS:
            importlib.import_module(name)
