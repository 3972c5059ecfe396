"""Checkpoints in Megatron's torch_dist format: written beside and renamed, read at any parallel layout.

Path: `trainer` saves after a round and loads at start; the converters save and load weights alone. Invariant: what
was saved and loaded again continues bit for bit, as long as the layout is the same (RNG states belong to ranks);
and a save that fails anywhere fails on every rank, and leaves no checkpoint.

Every function here is collective: all ranks call it with the same arguments.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, get_cuda_rng_tracker
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from slime.config.args import Args
from slime.megatron import checkpoint_files, device
from slime.megatron.build import architecture_of, unwrap
from slime.megatron.checkpoint_files import FoundCheckpoint, find_checkpoint
from slime.megatron.hf_weights import load_hf_into
from slime.models.hf_files import HFReader

__all__ = [
    "FoundCheckpoint",
    "LoadResult",
    "find_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
    "save_release",
]

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

# Of Megatron's three layouts of a distributed optimizer, the one that any other layout can read.
_CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True)
class LoadResult:
    """Where a run goes on. `state` is what `save_checkpoint` was given; None where only weights were loaded."""

    next_rollout_id: int
    state: dict[str, Any] | None
    source: str
    loaded: tuple[str, ...] = ("model",)
    """Of 'model', 'optimizer', 'scheduler', 'rng'."""


class _TorchSave(SaveShardedStrategy):
    """torch_dist by torch's own writer, in this process.

    Megatron's default strategy starts a manager process and forks writers, which takes seconds for a small model,
    is unsafe beside threads, and hangs where a child fails.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        state_dict_saver.save(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def save_checkpoint(
    args: Args,
    *,
    rollout_id: int,
    model: torch.nn.Module,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    state: dict[str, Any],
) -> Path:
    """Write `<--save>/iter_<rollout_id>`, point the tracker at it, and remove what --keep-last-checkpoints leaves out.

    `state`: the data side, JSON-able; rank 0's is written.

    Returns:
        The checkpoint's directory.
    """
    if args.save is None:
        raise ValueError("--save is unset: there is no place for a checkpoint; set it")
    save_dir = Path(args.save)
    content: dict[str, Any] = {"iteration": rollout_id, "rng_state": _rng_object()}
    if not args.no_save_optim:
        content["opt_param_scheduler"] = scheduler.state_dict()
        # Before the first step there is nothing in it but what a fresh one has.
        if _has_state(optimizer):
            content["optimizer"] = optimizer
    header = {"rollout_id": rollout_id, "layout": _layout(), "state": state}
    path = _save(save_dir, checkpoint_files.iteration_name(rollout_id), str(rollout_id), model, content, header)
    keep = args.keep_last_checkpoints
    if keep is not None:
        for removed in _on_rank_zero(lambda: checkpoint_files.remove_old(save_dir, keep)):
            logger.info("removed the old checkpoint %s (--keep-last-checkpoints %d)", removed, keep)
    return path


def save_release(save_dir: str | Path, *, model: torch.nn.Module) -> Path:
    """Write the weights alone, as `<save_dir>/release`."""
    return _save(Path(save_dir), checkpoint_files.RELEASE, "release", model, {}, None)


def _save(
    save_dir: Path,
    name: str,
    tracker: str,
    model: torch.nn.Module,
    content: dict[str, Any],
    header: dict[str, Any] | None,
) -> Path:
    written = _on_rank_zero(lambda: checkpoint_files.begin(save_dir, name))
    with device.layer(), _readable_errors(f"saving to {save_dir} failed"):
        weights = unwrap(model).sharded_state_dict(metadata=_CONTENT)
        if "optimizer" in content:
            content = {**content, "optimizer": content["optimizer"].sharded_state_dict(weights, metadata=_CONTENT)}
        dist_checkpointing.save(
            {**content, "model": weights, "checkpoint_version": 3.0},  # 3.0: Megatron's current layout of QKV
            str(written),
            sharded_strategy=_TorchSave(),
            content_metadata=_CONTENT,
        )

    def commit() -> Path:
        if header is not None:
            checkpoint_files.write_state(written, header)
        return checkpoint_files.commit(written, tracker)

    return _on_rank_zero(commit)


def load_checkpoint(
    found: FoundCheckpoint,
    args: Args,
    *,
    model: torch.nn.Module,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
) -> LoadResult:
    """Fill what is passed from `found`, which may also be a Hugging Face directory.

    Weights only where it holds no more, or with --finetune (then rollout 0 is next); an optimizer whose state is not
    loaded takes its fp32 copies from the new weights. RNG states are loaded together with the optimizer's, at the
    layout that saved them; at another one they are left alone, with a warning.

    Raises:
        ValueError: the model is not the checkpoint's.
    """
    if found.kind == "hf":
        load_hf_into(model, architecture_of(args), HFReader(found.path), args)
        return _weights_only(found, optimizer)
    header = checkpoint_files.read_state(found.path) if found.kind == "iteration" and not args.finetune else None
    common = dist_checkpointing.load_common_state_dict(str(found.path))
    with_optimizer = header is not None and optimizer is not None and not args.no_load_optim and "optimizer" in common
    with_rng = header is not None and optimizer is not None and not args.no_load_rng and _same_layout(header, found)
    loaded = _load_sharded(found, common, model, optimizer if with_optimizer else None, with_rng=with_rng)
    if header is None:
        return _weights_only(found, optimizer)
    taken = ["model"]
    if optimizer is not None:
        with device.layer():
            optimizer.load_state_dict(loaded["optimizer"]) if with_optimizer else optimizer.reload_model_params()
        taken += ["optimizer"] if with_optimizer else []
    if scheduler is not None and not args.no_load_optim and "opt_param_scheduler" in common:
        scheduler.load_state_dict(common["opt_param_scheduler"])
        taken.append("scheduler")
    if with_rng:
        _set_rng_state(loaded["rng_state"])
        taken.append("rng")
    return LoadResult(header["rollout_id"] + 1, header["state"], str(found.path), tuple(taken))


def _weights_only(found: FoundCheckpoint, optimizer: MegatronOptimizer | None) -> LoadResult:
    if optimizer is not None:
        with device.layer():
            optimizer.reload_model_params()
    return LoadResult(0, None, str(found.path))


def _load_sharded(
    found: FoundCheckpoint,
    common: dict[str, Any],
    model: torch.nn.Module,
    optimizer: MegatronOptimizer | None,
    *,
    with_rng: bool,
) -> dict[str, Any]:
    """Read this rank's parts; the model's are put into it, the rest is returned."""
    content = common.get("content_metadata") or _CONTENT
    core = unwrap(model)
    with device.layer(), _readable_errors(f"{found.path} does not fit this model (see MODEL_ARGS, --hf-checkpoint)"):
        weights = core.sharded_state_dict(metadata=content)
        wanted: dict[str, Any] = {"model": weights}
        if optimizer is not None:
            wanted["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=True, metadata=content)
        if with_rng:
            wanted["rng_state"] = _rng_object()
        loaded = dist_checkpointing.load(wanted, str(found.path))
        assert isinstance(loaded, dict)
        core.load_state_dict(loaded["model"])
    return loaded


def _has_state(optimizer: MegatronOptimizer) -> bool:
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return any(len(part.optimizer.state) > 0 for part in parts)


def _layout() -> dict[str, int]:
    """Sizes that decide what a rank is."""
    return {
        "world": dist.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
    }


def _same_layout(header: dict[str, Any], found: FoundCheckpoint) -> bool:
    saved, now = header["layout"], _layout()
    if saved != now:
        logger.warning("%s was saved at layout %s, this run has %s: RNG states are not loaded", found.path, saved, now)
    return saved == now


def _rng_object() -> ShardedObject:
    return ShardedObject("rng_state", _rng_state(), (dist.get_world_size(),), (dist.get_rank(),))


def _rng_tracker() -> CudaRNGStatesTracker:
    tracker = get_cuda_rng_tracker()
    assert tracker is not None
    return tracker


def _rng_state() -> dict[str, Any]:
    """Every generator that a rank draws from."""
    return {
        "random": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if device.on_cuda() else None,
        "megatron": _rng_tracker().get_states(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["random"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.on_cuda():
        torch.cuda.set_rng_state(state["cuda"])
    _rng_tracker().set_states(state["megatron"])


def _on_rank_zero(work: Callable[[], _T]) -> _T:
    """`work()` of rank 0, its result or its error on every rank: nobody waits for a rank that has failed."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except OSError as error:
            outcome[1] = f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise RuntimeError(f"checkpoint: {outcome[1]}")
    return outcome[0]


@contextmanager
def _readable_errors(what: str) -> Iterator[None]:
    """torch's CheckpointException is a BaseException that carries every rank's traceback: make it an ordinary error."""
    try:
        yield
    except CheckpointException as error:
        rank, (first, _) = next(iter(error.failures.items()))
        raise ValueError(f"{what}: rank {rank}: {type(first).__name__}: {first}") from None
    except CheckpointingException as error:
        raise ValueError(f"{what}: {error}") from error
