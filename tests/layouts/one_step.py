"""One step of a draw, split over ranks and in one process, and the distance between the two.

- Where it sits: `draws` describes the runs, and the functions here run in the processes of the pool.
- Invariant: only whole tensors are compared, by their Hugging Face names, gathered from all ranks; every rank has to
  have the same result.

At a point where the loss is not smooth, the smallest rounding decides, so a comparison means nothing there. If the
single process comes near such a point (`edges`), the draw gets new samples.

Shapes: _R response tokens of all samples.
"""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

from slime.config.args import Args
from slime.core.batch import TrainBatch
from slime.megatron.compat import cpu_layer
from slime.megatron.model.build import ModelChunks, ValueModel, architecture_of, named_parameters, named_weights, unwrap
from slime.megatron.model.hf_weights import iter_whole_tensors
from slime.megatron.trainer import Trainer
from tests.layouts.bugs import BUGS
from tests.layouts.draws import Draw, other_log_probs, samples
from tests.layouts.edges import Watch
from tests.worker_pool import WorkerPool

Arrays = dict[str, np.ndarray]

TOLERANCE = 1e-5
"""The relative tolerance of a whole set of tensors."""
TENSOR_TOLERANCE = 1e-4
"""The relative tolerance of one tensor's gradient: a wrong one might be too small to show in the whole."""
SMALLEST_PART = 5e-3
"""A share of the whole gradient's norm. A tensor with a smaller norm is measured as if it had this one, so it may be
off by four roundings (2**-23) of the whole. If each sequence is one token, queries and keys have rounding errors only.
"""
CANCELLED = 0.1
"""A share of the mean size of the loss's terms; a smaller loss, whose terms cancel, is measured against it."""
LEAST_GRADIENT = 1e-3
OF_THE_CUT = ("num_micro_batches", "fill", "dp_imbalance", "tokens_per_second", "loss", "grad_norm")
"""Metrics that describe how the work was split, and metrics that are compared separately."""
MOST_ATTEMPTS = 30
TIMEOUT = 600.0
"""The time limit of a run in seconds; the first run in a process includes the import of Megatron."""


@dataclass
class Outcome:
    """The result of one rank; only rank 0 returns arrays."""

    metrics: dict[str, float]
    digest: str
    """The digest of all weights after the step, as this rank gathered them."""
    gradients: Arrays
    weights: Arrays
    critic_gradients: Arrays
    critic_weights: Arrays
    """The critic's result; None without a critic."""


@dataclass
class Plain:
    """The result of the single process."""

    outcome: Outcome
    batch: TrainBatch
    """The samples, with the log-probs that were drawn near the policy's."""
    near: str
    """The reason why nothing can be compared with it; empty if it can."""
    size: float
    """The mean size of the terms of the loss."""


def ready(rank: int, world_size: int, init_method: str) -> None:
    """Do nothing: whoever runs this has imported all that a step needs."""


def plain_step(rank: int, world_size: int, init_method: str, args: Args, draw: Draw, attempt: int) -> Plain:
    """Run the step in one process, and make the samples for the split run."""
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    watch = Watch()
    try:
        trainer.load()
        _wake(trainer)
        batch = samples(draw, attempt)
        batch = other_log_probs(draw, attempt, trainer.log_probs(batch), batch)
        trainer._loss = watch.losses(trainer._loss)
        for chunk in [*trainer.model, *(trainer.critic.model if trainer.critic else ())]:
            watch.routers(chunk)
        metrics = trainer.train(0, batch)
        near = watch.near(batch)
        if metrics["train/grad_norm"] < LEAST_GRADIENT:
            near = "no gradient"
        return Plain(_outcome(trainer, metrics), batch, near, watch.size(batch))
    finally:
        trainer.close()


def cut_step(
    rank: int, world_size: int, init_method: str, args: Args, batch: TrainBatch, bug: str | None = None
) -> Outcome:
    """Run the step on one rank of the layout, with the named bug of `BUGS`, if any."""
    with BUGS[bug]() if bug else nullcontext():
        trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
        try:
            trainer.load()
            _wake(trainer)
            return _outcome(trainer, trainer.train(0, batch))
        finally:
            trainer.close()


def _wake(trainer: Trainer) -> None:
    """Give the critic's value head numbers: it begins at 0, where it passes no gradient on."""
    if trainer.critic is None:
        return
    for chunk in trainer.critic.model:
        head = cast(ValueModel, unwrap(chunk)).value_head
        if head is not None:
            numbers = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0))
            head.weight.data.copy_(numbers / numbers.size(1) ** 0.5)
    with cpu_layer.layer():
        trainer.critic.optimizer.reload_model_params()


def _outcome(trainer: Trainer, metrics: dict[str, float]) -> Outcome:
    models = [trainer.model, *([] if trainer.critic is None else [trainer.critic.model])]
    arrays: list[Arrays] = []
    for model in models:
        _complete_gradients(model)
        gradients = {name: _gradient(parameter) for name, parameter in named_parameters(model)}
        arrays += [_gathered(trainer, gradients), _gathered(trainer, dict(named_weights(model)))]
    arrays += [{}, {}] * (2 - len(models))
    digest = hashlib.sha256(b"".join(array.tobytes() for weights in arrays[1::2] for array in weights.values()))
    if trainer.topology.rank != 0:
        arrays = [{}] * 4
    return Outcome(metrics, digest.hexdigest(), *arrays)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    return cast(Any, parameter).main_grad if parameter.requires_grad else torch.zeros_like(parameter.data)


def _gathered(trainer: Trainer, tensors: dict[str, torch.Tensor]) -> Arrays:
    whole = iter_whole_tensors(tensors, architecture_of(trainer._args))
    return {name: tensor.detach().numpy().copy() for name, tensor in whole}


def _complete_gradients(model: ModelChunks) -> None:
    """Complete the gradients: with a distributed optimizer each rank has only its own shard of every bucket."""
    for wrapped in model:
        chunk: Any = wrapped
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shards = bucket.grad_data.chunk(group.size())
                for rank, shard in enumerate(shards):
                    if rank != group.rank():
                        shard.zero_()
                dist.all_reduce(bucket.grad_data, group=group)


@dataclass(frozen=True)
class Pair:
    """The two runs of a draw."""

    plain: Plain
    cut: Outcome
    near: tuple[str, ...]
    """The reasons why its samples were drawn again."""

    def errors(self) -> dict[str, float]:
        """Return how far the runs are apart, in units of the tolerance."""
        plain, cut = self.plain.outcome, self.cut
        loss, norm = plain.metrics["train/loss"], plain.metrics["train/grad_norm"]
        whole = _norm(plain.gradients)
        return {
            "loss": _off(cut.metrics["train/loss"], loss, max(abs(loss), CANCELLED * self.plain.size)),
            "gradient norm": _off(cut.metrics["train/grad_norm"], norm, norm),
            "gradient": _norm(_minus(cut.gradients, plain.gradients)) / whole / TOLERANCE,
            "weights": _norm(_minus(cut.weights, plain.weights)) / _norm(plain.weights) / TOLERANCE,
            "a tensor's gradient": _worst_tensor(cut.gradients, plain.gradients) / TENSOR_TOLERANCE,
            "other metrics": self._worst_metric() / TENSOR_TOLERANCE,
            **self._of_critic(),
        }

    def _of_critic(self) -> dict[str, float]:
        """Return how far the critics are apart; empty without a critic."""
        plain, cut = self.plain.outcome, self.cut
        if not plain.critic_weights:
            return {}
        found, expected = cut.critic_gradients, plain.critic_gradients
        moved = _norm(_minus(cut.critic_weights, plain.critic_weights))
        return {
            "critic's gradient": _norm(_minus(found, expected)) / _norm(expected) / TOLERANCE,
            "critic's weights": moved / _norm(plain.critic_weights) / TOLERANCE,
            "a tensor's gradient of the critic": _worst_tensor(found, expected) / TENSOR_TOLERANCE,
        }

    def _worst_metric(self) -> float:
        plain, cut = (
            {name: value for name, value in each.metrics.items() if name.startswith(("train/", "critic/"))}
            for each in (self.plain.outcome, self.cut)
        )
        names = {name for name in {*plain, *cut} if name.partition("/")[2] not in OF_THE_CUT}
        assert names <= plain.keys() & cut.keys(), f"not in both: {names - (plain.keys() & cut.keys())}"
        return max(abs(cut[name] - plain[name]) / max(abs(plain[name]), 0.1) for name in names)


def _worst_tensor(found: Arrays, expected: Arrays) -> float:
    whole = _norm(expected)
    return max(
        float(np.linalg.norm(difference) / max(np.linalg.norm(expected[name]), SMALLEST_PART * whole))
        for name, difference in _minus(found, expected).items()
    )


def _off(found: float, expected: float, scale: float) -> float:
    return abs(found - expected) / scale / TOLERANCE


def _minus(found: Arrays, expected: Arrays) -> Arrays:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return {name: values.astype(np.float64) - expected[name] for name, values in found.items()}


def _norm(values: Arrays) -> float:
    return float(np.sqrt(sum(np.square(each, dtype=np.float64).sum() for each in values.values())))


def run_plain(workers: WorkerPool, draw: Draw, root: Path) -> tuple[Plain, tuple[str, ...]]:
    """Run the single process, with new samples until it is clear of all edges; return it, and why others were not."""
    near: list[str] = []
    args = draw.args(root, cut=False)
    for attempt in range(MOST_ATTEMPTS):
        [plain] = workers.run(1, plain_step, args, draw, attempt, timeout=TIMEOUT)
        if not plain.near:
            return plain, tuple(near)
        near.append(plain.near)
    raise AssertionError(f"seed {draw.seed}: no samples are clear of all edges: {near}")


def run_pair(workers: WorkerPool, draw: Draw, root: Path, bug: str | None = None) -> Pair:
    """Run the draw in one process and split."""
    plain, near = run_plain(workers, draw, root)
    return Pair(plain, run_cut(workers, draw, root, plain.batch, bug), near)


def run_cut(workers: WorkerPool, draw: Draw, root: Path, batch: TrainBatch, bug: str | None = None) -> Outcome:
    """Run all ranks, which have to have the same result, and return it."""
    if draw.shuffled:
        batch = batch.select(np.random.default_rng(draw.seed).permutation(len(batch)).tolist())
    ranks = workers.run(draw.num_ranks, cut_step, draw.args(root, cut=True), batch, bug, timeout=TIMEOUT)
    first = ranks[0]
    for rank in ranks[1:]:
        assert _timeless(rank) == _timeless(first), "ranks tell of different metrics"
        assert rank.digest == first.digest, "ranks hold different weights"
    return first


def _timeless(outcome: Outcome) -> dict[str, float]:
    return {name: value for name, value in outcome.metrics.items() if "time" not in name and "second" not in name}
