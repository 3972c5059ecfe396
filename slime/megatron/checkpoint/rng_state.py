"""The states of a rank's random generators, as a part of its checkpoint.

- Used by: `save_load` saves and loads them.
- Invariant: states belong to ranks, so they are loaded only at the layout that saved them.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, get_cuda_rng_tracker

logger = logging.getLogger(__name__)

KEY = "rng_state"


def layout() -> dict[str, int]:
    """Return the sizes that give each rank its role."""
    return {
        "world": dist.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
    }


def is_this_layout(saved: dict[str, int], path: Path) -> bool:
    """Return whether the checkpoint in `path` has this layout; if not, log a warning."""
    now = layout()
    if saved != now:
        logger.warning("%s was saved at layout %s, this run has %s: RNG states are not loaded", path, saved, now)
    return saved == now


def rng_object() -> ShardedObject:
    """Return the states of all generators that this rank draws from."""
    state = {
        "random": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": _tracker().get_states(),
    }
    return ShardedObject(KEY, state, (dist.get_world_size(),), (dist.get_rank(),))


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the states that `rng_object` has collected."""
    random.setstate(state["random"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    _tracker().set_states(state["megatron"])


def _tracker() -> CudaRNGStatesTracker:
    tracker = get_cuda_rng_tracker()
    assert tracker is not None
    return tracker
