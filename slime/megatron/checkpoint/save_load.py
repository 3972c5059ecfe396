"""Checkpoints in Megatron's torch_dist format, which any parallel layout can read.

- Used by: `trainer` takes a snapshot after a rollout and loads at start; the converters save and load weights alone.
- Invariant: training that is saved and loaded continues bit for bit if the layout is the same (RNG states belong to
  ranks), and a save that fails leaves no part of a checkpoint.

A checkpoint is written to a temporary directory next to its final place and renamed when it is complete. Every function
here is collective: all ranks call it with the same arguments.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from slime.core.checkpoint_names import RUN, RUN_FILE, iteration_name
from slime.megatron.checkpoint import files, manifest, rng_state, state_arrays, torch_dist
from slime.megatron.checkpoint.files import CRITIC, FoundCheckpoint, find_checkpoint
from slime.megatron.checkpoint.safe_pickle import UnreadableFileError, UnsafeFileError
from slime.megatron.checkpoint.search import changed_in, damage_of, on_rank_zero
from slime.megatron.checkpoint.snapshot import Model, Snapshot, take
from slime.megatron.checkpoint.staging import Staging
from slime.megatron.compat import cpu_layer
from slime.megatron.model.build import EMBEDDING, OUTPUT, VALUE_HEAD, ModelChunks, PolicyModel, ValueModel, unwrap
from slime.megatron.optim.optimizer_state import fill, has_state, saved_state, take_main_weights, wanted_state

__all__ = [
    "CRITIC",
    "FoundCheckpoint",
    "LoadedCheckpoint",
    "Trained",
    "find_checkpoint",
    "load_checkpoint",
    "save_release",
    "take_checkpoint",
]

logger = logging.getLogger(__name__)

# Megatron has three layouts of a distributed optimizer; this is the one that any other parallel layout can read.
_CONTENT: Mapping[str, Any] = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}

_SIZES = "model_sizes"

_NOT_WEIGHTS = ("optimizer.", rng_state.KEY)
"""The prefixes of keys that are not weights."""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """The result of `load_checkpoint`: what was filled, and the `state` as `save_checkpoint` got it.

    Only rank 0's `state` has its arrays. `rollout_id` is the last rollout that was trained on; None for weights only.
    """

    path: Path
    rollout_id: int | None
    state: dict[str, Any] | None
    loaded: tuple[str, ...]
    """Some of 'model', 'optimizer', 'scheduler', 'rng'."""

    @property
    def next_rollout_id(self) -> int:
        """The rollout with which training continues; 0 after weights alone."""
        return 0 if self.rollout_id is None else self.rollout_id + 1


@dataclass(frozen=True)
class Trained:
    """A model and what trains it. `state` is JSON-able, except for arrays in its dicts; rank 0's is written."""

    model: ModelChunks
    optimizer: MegatronOptimizer | None
    scheduler: OptimizerParamScheduler | None
    state: dict[str, Any]

    def content(self, rollout_id: int) -> dict[str, Any]:
        """Return what is saved together with the weights; the optimizer is still an object, not a state dict."""
        content: dict[str, Any] = {"iteration": rollout_id}
        if self.optimizer is not None and has_state(self.optimizer):
            content["optimizer"] = self.optimizer
        if self.scheduler is not None:
            content["opt_param_scheduler"] = self.scheduler.state_dict()
        return content


def take_checkpoint(
    save_dir: str | Path,
    *,
    rollout_id: int,
    model: ModelChunks,
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    state: dict[str, Any],
    keep_last: int | None = None,
    critic: Trained | None = None,
    staging: Staging | None = None,
) -> Snapshot:
    """Return a snapshot of this moment, which writes `<save_dir>/iter_<rollout_id>` and points the tracker file at it.

    Args:
        state: the state of the run, JSON-able except for numpy arrays in its dicts; rank 0's is written. It is not
            copied, so nothing may change it afterwards. Its entry RUN is written as a file of its own, which is not
            loaded.
        keep_last: keep this many of the newest checkpoints and remove the older ones.
        critic: is written as a checkpoint of its own inside this one.
        staging: memory for copies of the tensors; None: they are not copied, and must not change before they are
            written.
    """
    texts = {RUN_FILE: json.dumps(state[RUN])} if RUN in state else {}
    state = {key: value for key, value in state.items() if key != RUN}
    policy = Trained(model, optimizer, scheduler, state)
    header = {"rollout_id": rollout_id, "layout": rng_state.layout(), "state": state}
    models: list[Model] = []
    with cpu_layer.layer(), _readable_errors(f"saving to {save_dir} failed", RuntimeError):
        if critic is not None:
            content = _saved_state(critic.model, critic.content(rollout_id))
            models.append(Model(content, {**header, "state": critic.state}, inside=CRITIC))
            header[manifest.PARTS] = [CRITIC]
        content = policy.content(rollout_id) | {rng_state.KEY: rng_state.rng_object()}
        models.append(Model(_saved_state(model, content), header, texts=texts))
        return take(
            Path(save_dir),
            iteration_name(rollout_id),
            models,
            tracker=str(rollout_id),
            staging=staging,
            keep_last=keep_last,
            saved=rollout_id,
        )


def save_release(save_dir: str | Path, *, model: ModelChunks) -> Path:
    """Write the weights alone, as `<save_dir>/release`."""
    with cpu_layer.layer(), _readable_errors(f"saving to {save_dir} failed", RuntimeError):
        models = [Model(_saved_state(model, {}), {})]
        return take(Path(save_dir), files.RELEASE, models, tracker="release", staging=None).write()


def _saved_state(model: ModelChunks, content: dict[str, Any]) -> dict[str, Any]:
    """Return the sharded tensors and the settings of one model, with the metadata by which Megatron reads them."""
    metadata = dict(_CONTENT)  # Megatron writes this run's process groups into it
    weights = _sharded_weights(model, metadata)
    if "optimizer" in content:
        content = {**content, "optimizer": saved_state(content["optimizer"], weights, metadata)}
    own = {"model": weights, "checkpoint_version": 3.0, _SIZES: _sizes(unwrap(model[0]))}  # 3.0: the layout of QKV
    return {**content, **own, "content_metadata": dict(_CONTENT)}


def load_checkpoint(
    found: FoundCheckpoint,
    *,
    model: ModelChunks,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    load_rng: bool = False,
) -> LoadedCheckpoint:
    """Fill the objects that are passed from a torch_dist checkpoint (from an HF directory: `hf_weights.load_hf_into`).

    What the checkpoint does not hold keeps its value. The exception is an optimizer's fp32 copies: they are made again
    from the weights. A critic takes a policy's weights except its output layer. RNG states are loaded if the layout is
    the one that saved them; otherwise they keep their values, with a warning.

    Raises:
        ValueError: the model is not the checkpoint's, or a file is not what was written.
        RuntimeError: rank 0 cannot read the arrays of the state.
    """
    if found.kind == "hf":
        raise ValueError(f"{found.path} is a Hugging Face directory, not a torch_dist checkpoint")
    if not found.verified and (changed := changed_in(found)):
        raise ValueError(damage_of(found, changed))
    header = manifest.read_state(found.path) if found.kind == "iteration" else None
    common = torch_dist.read_common(found.path)
    with_optimizer = optimizer is not None and "optimizer" in common
    _load_weights(found, common, model, with_optimizer=with_optimizer)
    taken = ["model"]
    if optimizer is not None:
        if with_optimizer:
            _load_optimizer(found, common, model, optimizer)
            taken.append("optimizer")
        else:
            with cpu_layer.layer():
                optimizer.reload_model_params()
    if scheduler is not None and "opt_param_scheduler" in common:
        scheduler.num_steps = 0  # Megatron adds the saved steps to those that it has counted
        scheduler.load_state_dict(common["opt_param_scheduler"])
        taken.append("scheduler")
    if load_rng and header is not None and rng_state.is_this_layout(header["layout"], found.path):
        with _readable_errors(_misfit(found), ValueError):
            states = torch_dist.load_sharded(found.path, {rng_state.KEY: rng_state.rng_object()}, shared=False)
        rng_state.set_rng_state(states[rng_state.KEY])
        taken.append("rng")
    if header is not None:
        on_rank_zero(lambda: state_arrays.put_back(found.path, header))
    state = None if header is None else header["state"]
    return LoadedCheckpoint(found.path, found.rollout_id, state, tuple(taken))


def _load_weights(found: FoundCheckpoint, common: dict[str, Any], model: ModelChunks, *, with_optimizer: bool) -> None:
    with cpu_layer.layer(), _readable_errors(_misfit(found), ValueError):
        _refuse_other_sizes(found, common, unwrap(model[0]))
        saved = set(torch_dist.saved_shapes(found.path))
        weights = _sharded_weights(model, _content(common))
        of_policy = isinstance(unwrap(model[0]), ValueModel) and VALUE_HEAD not in saved
        if of_policy:  # a critic skips its output layer and keeps its own value head
            weights = {name: part for name, part in weights.items() if part.key != VALUE_HEAD}
            saved.discard(OUTPUT)
        _refuse_more(found, weights, saved)
        # Pickled and useless without Transformer Engine, so they are never read, whoever wrote the checkpoint.
        extra = [name for name, part in weights.items() if isinstance(part, ShardedObject)]
        weights = {name: part for name, part in weights.items() if name not in extra}
        if with_optimizer:
            take_main_weights(weights, saved)
        loaded = torch_dist.load_sharded(found.path, {"model": weights}, shared=True)["model"] | dict.fromkeys(extra)
        for number, chunk in enumerate(model):
            unwrap(chunk).load_state_dict(_of_chunk(loaded, number), strict=not of_policy)


def _load_optimizer(
    found: FoundCheckpoint, common: dict[str, Any], model: ModelChunks, optimizer: MegatronOptimizer
) -> None:
    with cpu_layer.layer(), _readable_errors(_misfit(found), ValueError):
        saved = set(torch_dist.saved_shapes(found.path))
        weights = _sharded_weights(model, _content(common))
        wanted = wanted_state(optimizer, weights, saved, _content(common), str(found.path))
        fill(
            optimizer,
            torch_dist.load_sharded(found.path, {"optimizer_state": wanted}, shared=True)["optimizer_state"],
            common["optimizer"],
        )


def _sharded_weights(model: ModelChunks, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the sharded tensors of all chunks; their keys in the checkpoint number layers over the whole model."""
    return {
        f"{number}.{name}": part
        for number, chunk in enumerate(model)
        for name, part in unwrap(chunk).sharded_state_dict(metadata=metadata).items()
    }


def _of_chunk(weights: dict[str, Any], number: int) -> dict[str, Any]:
    """Return the part of `_sharded_weights` that belongs to one chunk, by the chunk's own names."""
    prefix = f"{number}."
    return {name.removeprefix(prefix): part for name, part in weights.items() if name.startswith(prefix)}


def _content(common: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of the save, by which Megatron names and shards what it reads."""
    return dict(common.get("content_metadata") or _CONTENT)


def _misfit(found: FoundCheckpoint) -> str:
    return f"{found.path} does not fit this model (see MODEL_ARGS, --hf-checkpoint)"


def _sizes(core: PolicyModel) -> dict[str, int]:
    """Return sizes that tensor shapes do not show: tables are padded, and many head counts fill the same matrix."""
    heads = ("num_attention_heads", "num_query_groups", "kv_channels")
    return {"vocab_size": core.num_token_ids, **{name: int(getattr(core.config, name)) for name in heads}}


def _refuse_other_sizes(found: FoundCheckpoint, common: dict[str, Any], core: PolicyModel) -> None:
    """Refuse a checkpoint of other sizes, because Megatron fills a table from one of any length without an error."""
    ours, theirs = _sizes(core), common.get(_SIZES, {})
    wrong = [f"{name} {size} there, {ours[name]} here" for name, size in theirs.items() if size != ours[name]]
    table = torch_dist.saved_shapes(found.path).get(EMBEDDING)
    if table is not None and table[0] < core.num_token_ids:
        wrong.append(f"an embedding of {table[0]} rows there, {core.num_token_ids} token ids here")
    if wrong:
        raise ValueError(f"{_misfit(found)}: {'; '.join(wrong)}")


def _refuse_more(found: FoundCheckpoint, weights: dict[str, Any], saved: set[str]) -> None:
    """Refuse a checkpoint with weights that the model has no place for, because Megatron ignores them in silence."""
    wanted: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(wanted, {part.key for part in weights.values()})
    more = {
        key
        for key in saved.difference(*wanted)
        if not key.startswith(_NOT_WEIGHTS) and not key.endswith("_extra_state")
    }
    if more:
        raise ValueError(f"{_misfit(found)}: it also holds {', '.join(sorted(more))}")


@contextmanager
def _readable_errors(what: str, kind: type[Exception]) -> Iterator[None]:
    """Turn torch's CheckpointException, a BaseException with every rank's traceback, into an ordinary error."""
    try:
        yield
    except CheckpointException as error:
        rank, (first, _) = next(iter(error.failures.items()))
        if isinstance(first, UnsafeFileError | UnreadableFileError):
            raise first from None
        raise kind(f"{what}: rank {rank}: {type(first).__name__}: {first}") from None
    except CheckpointingException as error:
        raise kind(f"{what}: {error}") from error
