"""Functions that tests run in the pool's processes: a Trainer on batches, with its gradients and weights gathered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state

from slime.config.args import Args
from slime.core.batch import TrainBatch
from slime.megatron.model.build import named_parameters
from slime.megatron.parallel import expert_place
from slime.megatron.trainer import Trainer
from slime.models.families import weight_table

Arrays = dict[str, np.ndarray]


@dataclass
class Outcome:
    metrics: list[dict[str, float]]
    gradients: Arrays
    """Gradients of the last step by HF name; they are unclipped only if --clip-grad is 0."""
    weights: Arrays
    log_probs: np.ndarray
    """Log-probs of the last batch, after training."""


def train(rank: int, world_size: int, init_method: str, args: Args, batches: list[TrainBatch]) -> Outcome:
    """Load, then train on each batch as a rollout of its own."""
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        metrics = [trainer.train(number, batch) for number, batch in enumerate(batches)]
        return Outcome(metrics, gradients(trainer), weights(trainer), trainer.log_probs(batches[-1]))
    finally:
        trainer.close()


def gradients(trainer: Trainer) -> Arrays:
    """Return whole gradients of all stages by HF name; the weight table's linear rules hold for gradients, too."""
    table = weight_table(trainer._arch)
    found: Arrays = {}
    for name, parameter in named_parameters(trainer.model):
        full: Any = parameter.main_grad.clone()
        shards: list[Any]
        if table.rule(name).num_experts:
            place = expert_place()
            shards = [None] * place.etp_size
            dist.all_gather_object(shards, full, group=parallel_state.get_expert_tensor_parallel_group())
            full = table.join(name, shards)
        elif table.rule(name).tp_axis is not None and trainer.topology.tp_size > 1:
            shards = [None] * trainer.topology.tp_size
            dist.all_gather_object(shards, full, group=trainer.topology.tp_group)
            full = table.join(name, shards)
        found |= {hf_name: tensor.numpy() for hf_name, tensor in table.to_hf(name, full)}
    experts: list[Any] = [None] * expert_place().group.size()
    dist.all_gather_object(experts, found, group=expert_place().group)
    found = {name: gradient for own in experts for name, gradient in own.items()}
    stages: list[Any] = [None] * trainer.topology.pp_size
    dist.all_gather_object(stages, found, group=trainer.topology.pp_group)
    return {name: gradient for stage in stages for name, gradient in stage.items()}


def weights(trainer: Trainer) -> Arrays:
    return {name: tensor.float().numpy().copy() for name, tensor in trainer.iter_hf_tensors()}


def difference(found: Arrays, expected: Arrays) -> float:
    """Return the largest difference of any entry, relative to its tensor's largest entry (which may be all zeros)."""
    assert found.keys() == expected.keys()
    return max(
        float(np.abs(found[name] - expected[name]).max() / (np.abs(expected[name]).max() or 1.0)) for name in found
    )
