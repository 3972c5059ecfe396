"""The optimizer's part of a checkpoint, which any kind of optimizer loads at any parallel layout.

- Used by: `save_load` saves and loads an optimizer through this.
- Invariant: state (main weights, moments, step) comes from the checkpoint alone, and settings (learning rate, weight
  decay, betas) come from the run's own flags.

Megatron's three optimizers have the same tensors, `optimizer.state.<slot>.<parameter>`, under different slot names:

    fp32         exp_avg, exp_avg_sq; or momentum_buffer (sgd)       the weights themselves are the main weights
    bf16         the same                                            fp32_param: the main weights
    distributed  exp_avg, exp_avg_sq                                 param: the main weights, in bf16 and fp32
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer

from slime.megatron.optim.flat_shares import flat_shares

PREFIX = "optimizer.state."
_MAIN_SLOTS = frozenset({"param", "fp32_param"})
_KINDS = {
    frozenset({"exp_avg", "exp_avg_sq"}): "adam",
    frozenset({"momentum_buffer"}): "sgd with momentum",
    frozenset[str](): "sgd without momentum",
}


def parts_of(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Return the chained optimizers: Megatron makes one for dense weights, and one for experts if there are any."""
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def has_state(optimizer: MegatronOptimizer) -> bool:
    """True if there is state to save; before its first step, an Adam holds nothing that a new one would not."""
    return any(part.optimizer.state or isinstance(part.optimizer, torch.optim.SGD) for part in parts_of(optimizer))


def take_main_weights(weights: dict[str, Any], saved: Iterable[str]) -> None:
    """Let an fp32 run read its weights from the main weights of a checkpoint in another dtype."""
    main = _main_slot(saved)
    for part in _sharded(weights):
        assert part.data is not None
        if main is not None and part.data.dtype == torch.float32:
            part.key = f"{PREFIX}{main}.{part.key}"


def saved_state(optimizer: MegatronOptimizer, weights: dict[str, Any], metadata: dict[str, Any]) -> dict[Any, Any]:
    """Return the state to save: sharded tensors of what this rank holds, and settings.

    Nothing is gathered, and the tensors are views of the state itself.
    """

    def saved(part: MegatronOptimizer) -> dict[str, Any]:
        if not isinstance(part, DistributedOptimizer):
            return part.sharded_state_dict(weights, metadata=metadata)
        kind = metadata["distrib_optim_sharding_type"]
        state = {"param_state": flat_shares(part, weights, PREFIX), "param_state_sharding_type": kind}
        return part.state_dict() | state

    return _sharded_parts(optimizer, saved)


def _sharded_parts(
    optimizer: MegatronOptimizer, sharded: Callable[[MegatronOptimizer], dict[str, Any]]
) -> dict[Any, Any]:
    """Return what `sharded` makes of the chained optimizers, by number if there are several."""
    parts = parts_of(optimizer)
    found = {number: sharded(part) for number, part in enumerate(parts)}
    return found if len(parts) > 1 else found[0]


def _wanted_part(part: MegatronOptimizer, weights: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(part, DistributedOptimizer):
        return part.sharded_state_dict(weights, is_loading=True, metadata=metadata)
    part.load_state_dict(part.state_dict())  # allocates the state
    return {"param_state": flat_shares(part, weights, PREFIX)}


def wanted_state(
    optimizer: MegatronOptimizer, weights: dict[str, Any], saved: Iterable[str], metadata: dict[str, Any], where: str
) -> dict[str, Any]:
    """Return the sharded tensors to load, under the names `saved` that the checkpoint uses for them.

    Raises:
        ValueError: they belong to another kind of optimizer; `where` names the checkpoint.
    """
    wanted = _sharded_parts(optimizer, lambda part: _wanted_part(part, weights, metadata))
    ours = _moments(part.key for part in _sharded(wanted))
    theirs = _moments(saved)
    if ours != theirs:
        raise ValueError(
            f"{where} holds the optimizer state of {_KINDS.get(theirs, sorted(theirs))}, and this run's optimizer is "
            f"{_KINDS.get(ours, sorted(ours))}: use that one, or give --no-load-optim to start with a new state"
        )
    main = _main_slot(saved)
    for part in _sharded(wanted):
        slot, _, name = part.key.removeprefix(PREFIX).partition(".")
        if slot in _MAIN_SLOTS:
            part.key = name if main is None else f"{PREFIX}{main}.{name}"
    return wanted


def fill(optimizer: MegatronOptimizer, loaded: dict[Any, Any], common: Any) -> None:
    """Put the loaded tensors of `wanted_state`, and the step in the checkpoint's common part, into the optimizer."""
    steps = set(_steps(common))
    assert len(steps) <= 1, f"one optimizer step for all parameters: {steps}"
    step = steps.pop() if steps else None
    parts = parts_of(optimizer)
    for number, part in enumerate(parts):
        part.load_state_dict(_state_dict(part, loaded if len(parts) == 1 else loaded[number], step))


def _state_dict(part: MegatronOptimizer, tensors: dict[str, Any], step: int | None) -> dict[str, Any]:
    """Return what this kind of optimizer loads: its own settings, and tensors and step from the checkpoint."""
    if isinstance(part, DistributedOptimizer):  # its tensors were loaded in their places
        groups = part.state_dict()["optimizer"]["param_groups"]
        return {"optimizer": {"param_groups": [{**group, "step": step} for group in groups]}}
    in_fp32 = isinstance(part, FP32Optimizer)
    inner = tensors if in_fp32 else tensors["optimizer"]
    state, groups = dict(inner.get("state", {})), part.optimizer.state_dict()["param_groups"]
    if isinstance(part.optimizer, torch.optim.Adam):
        state["common_step"] = torch.tensor(float(step or 0))
    elif step is not None:  # the Adam of TransformerEngine and Apex keeps it in the group; SGD has none
        groups = [{**group, "step": step} for group in groups]
    inner = {"state": state, "param_groups": groups}
    return inner if in_fp32 else {**tensors, "optimizer": inner}


def _sharded(tree: Any) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    if isinstance(tree, (ShardedTensor, ShardedTensorFactory)):
        yield tree
    elif isinstance(tree, (dict, list)):
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from _sharded(child)


def _slots(keys: Iterable[str]) -> set[str]:
    return {key.removeprefix(PREFIX).partition(".")[0] for key in keys if key.startswith(PREFIX)}


def _moments(keys: Iterable[str]) -> frozenset[str]:
    return frozenset(_slots(keys) - _MAIN_SLOTS)


def _main_slot(saved: Iterable[str]) -> str | None:
    found = _slots(saved) & _MAIN_SLOTS
    return found.pop() if found else None


def _steps(common: Any) -> Iterator[int]:
    """Yield the optimizer step from the place where each kind of Megatron's optimizers stores it."""
    if isinstance(common, dict):
        for name, child in common.items():
            if name in ("step", "common_step"):
                yield int(child)
            else:
                yield from _steps(child)
    elif isinstance(common, list):
        for child in common:
            yield from _steps(child)
