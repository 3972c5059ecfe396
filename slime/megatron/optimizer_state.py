"""An optimizer's part of a checkpoint, which any kind of optimizer at any layout loads.

Path: `checkpoint` saves and loads an optimizer through this. Invariant: what is loaded comes from the checkpoint alone
where it is state (main weights, moments, step), and from the run's own flags where it is a setting (learning rate,
weight decay, betas).

Megatron's three optimizers write the same tensors, `optimizer.state.<slot>.<parameter>`, each in its own words:

    fp32         exp_avg, exp_avg_sq; or momentum_buffer (sgd)       the weights themselves are the main weights
    bf16         the same                                            fp32_param: the main weights
    distributed  exp_avg, exp_avg_sq                                 param: the main weights, in bf16 and fp32
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer

PREFIX = "optimizer.state."
_MAIN_SLOTS = frozenset({"param", "fp32_param"})
_KINDS = {
    frozenset({"exp_avg", "exp_avg_sq"}): "adam",
    frozenset({"momentum_buffer"}): "sgd with momentum",
    frozenset[str](): "sgd without momentum",
}


def parts_of(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Megatron chains one optimizer for dense weights, and one for experts where there are any."""
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def has_state(optimizer: MegatronOptimizer) -> bool:
    """Whether there is anything to save: before its first step, Adam holds nothing but what a fresh one has."""
    return any(part.optimizer.state or isinstance(part.optimizer, torch.optim.SGD) for part in parts_of(optimizer))


def take_main_weights(weights: dict[str, Any], saved: Iterable[str]) -> None:
    """Have a run in fp32 read its weights where a checkpoint has the main weights of another dtype's."""
    main = _main_slot(saved)
    for part in _sharded(weights):
        assert part.data is not None
        if main is not None and part.data.dtype == torch.float32:
            part.key = f"{PREFIX}{main}.{part.key}"


def wanted_state(
    optimizer: MegatronOptimizer, weights: dict[str, Any], saved: Iterable[str], metadata: dict[str, Any], where: str
) -> dict[str, Any]:
    """The sharded tensors to load, by the names `saved` that the checkpoint has for them.

    Raises:
        ValueError: they are another optimizer's; `where` names the checkpoint.
    """
    wanted = optimizer.sharded_state_dict(weights, is_loading=True, metadata=metadata)
    ours = _moments(part.key for part in _sharded(wanted))
    theirs = _moments(saved)
    if ours != theirs:
        raise ValueError(
            f"{where} holds the optimizer state of {_KINDS.get(theirs, sorted(theirs))}, and this run's optimizer is "
            f"{_KINDS.get(ours, sorted(ours))}: go on with that one, or give --no-load-optim to start with a new state"
        )
    main = _main_slot(saved)
    for part in _sharded(wanted):
        slot, _, name = part.key.removeprefix(PREFIX).partition(".")
        if slot in _MAIN_SLOTS:
            part.key = name if main is None else f"{PREFIX}{main}.{name}"
    return wanted


def fill(optimizer: MegatronOptimizer, loaded: dict[Any, Any], common: Any) -> None:
    """Put `wanted_state`'s loaded tensors, and the step in the checkpoint's common part, into the optimizer."""
    steps = set(_steps(common))
    assert len(steps) <= 1, f"one optimizer step for all parameters: {steps}"
    step = steps.pop() if steps else None
    parts = parts_of(optimizer)
    for number, part in enumerate(parts):
        part.load_state_dict(_state_dict(part, loaded if len(parts) == 1 else loaded[number], step))


def _state_dict(part: MegatronOptimizer, tensors: dict[str, Any], step: int | None) -> dict[str, Any]:
    """What this kind of optimizer loads: settings as they are, tensors and step as they were saved."""
    if isinstance(part, DistributedOptimizer):
        groups = part.state_dict()["optimizer"]["param_groups"]
        return {
            "optimizer": {"param_groups": [{**group, "step": step} for group in groups]},
            "param_state": tensors["param_state"],
            "param_state_sharding_type": "fully_reshardable",
        }
    in_fp32 = isinstance(part, FP32Optimizer)
    inner = tensors if in_fp32 else tensors["optimizer"]
    state, groups = dict(inner.get("state", {})), part.optimizer.state_dict()["param_groups"]
    if isinstance(part.optimizer, torch.optim.Adam):
        state["common_step"] = torch.tensor(float(step or 0))
    elif step is not None:  # TransformerEngine's and Apex's Adam keep it in the group; SGD has none
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
    """The optimizer step, wherever Megatron's kinds of optimizers put it."""
    if isinstance(common, dict):
        for name, child in common.items():
            if name in ("step", "common_step"):
                yield int(child)
            else:
                yield from _steps(child)
    elif isinstance(common, list):
        for child in common:
            yield from _steps(child)
