"""Chunked, vocabulary-parallel log-probs and entropy against log_softmax over the whole vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from worker_pool import WorkerPool, joined

from slime.config.args import Args
from slime.megatron.logprobs import response_log_probs

pytestmark = pytest.mark.dist

HIDDEN, TOKENS, PADDED = 24, 40, 128


def _inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "hidden": draw(TOKENS, 1, HIDDEN),
        "weight": draw(PADDED, HIDDEN),
        "predicting": torch.randperm(TOKENS, generator=generator)[:27],
        "targets": torch.randint(0, tiny.VOCAB, (27,), generator=generator),
        "of_log_probs": draw(27),
        "of_entropy": draw(27),
    }


def _plain(temperature: float, *, entropy_gradient: bool, vocab: int = tiny.VOCAB) -> dict[str, Any]:
    x = _inputs()
    hidden, weight = x["hidden"].requires_grad_(), x["weight"].requires_grad_()
    logits = F.linear(hidden[x["predicting"], 0], weight[:vocab]) / (temperature or 1.0)
    log_probs = logits.log_softmax(-1)
    chosen = log_probs.gather(1, x["targets"][:, None])[:, 0]
    entropy = -(log_probs.exp() * log_probs).sum(1)
    loss = (chosen * x["of_log_probs"]).sum()
    if entropy_gradient:
        loss = loss + (entropy * x["of_entropy"]).sum()
    loss.backward()
    return {"log_probs": chosen, "entropy": entropy, "hidden": hidden.grad, "weight": weight.grad}


def _ours(
    rank: int,
    world_size: int,
    init_method: str,
    args: Args,
    temperature: float,
    chunk_size: int,
    entropy_gradient: bool,
) -> dict[str, Any]:
    """Compute what `_plain` does; under sequence parallelism hidden states and their gradient are cut over ranks."""
    with joined(args, rank, world_size, init_method) as topology:
        x = _inputs()
        hidden = x["hidden"].chunk(world_size)[rank] if args.sequence_parallel else x["hidden"]
        hidden = hidden.clone().requires_grad_()
        weight = x["weight"].chunk(world_size)[rank].clone().requires_grad_()
        log_probs, entropy = response_log_probs(
            hidden,
            weight,
            x["predicting"],
            x["targets"],
            vocab_size=tiny.VOCAB,
            temperature=temperature,
            chunk_size=chunk_size,
            with_entropy=True,
            sequence_parallel=args.sequence_parallel,
            group=topology.tp_group,
        )
        assert entropy is not None
        loss = (log_probs * x["of_log_probs"]).sum()
        if entropy_gradient:
            loss = loss + (entropy * x["of_entropy"]).sum()
        loss.backward()
        found = {"log_probs": log_probs, "entropy": entropy, "hidden": hidden.grad, "weight": weight.grad}
        return {name: value.detach().numpy() for name, value in found.items() if value is not None}


def _worst(ranks: list[dict[str, Any]], expected: dict[str, torch.Tensor], *, sequence_parallel: bool) -> float:
    first = {name: torch.from_numpy(value) for name, value in ranks[0].items()}
    first["weight"] = torch.cat([torch.from_numpy(found["weight"]) for found in ranks])
    if sequence_parallel:
        first["hidden"] = torch.cat([torch.from_numpy(found["hidden"]) for found in ranks])
    return max(
        ((first[name] - value.detach()).abs().max() / value.detach().abs().max()).item()
        for name, value in expected.items()
    )


@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("chunk_size", [1, 10, 1000])
def test_one_rank(temperature: float, chunk_size: int, workers: WorkerPool, tmp_path: Path) -> None:
    args = tiny.make_args(tiny.hf_dir(tmp_path, "qwen3"))
    ranks = workers.run(1, _ours, args, temperature, chunk_size, True)
    assert _worst(ranks, _plain(temperature, entropy_gradient=True), sequence_parallel=False) < 1e-5
    assert _worst(ranks, _plain(temperature + 0.1, entropy_gradient=True), sequence_parallel=False) > 1e-3


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_two_ranks(sequence_parallel: bool, entropy_gradient: bool, workers: WorkerPool, tmp_path: Path) -> None:
    args = tiny.make_args(
        tiny.hf_dir(tmp_path, "qwen3"), tensor_model_parallel_size=2, sequence_parallel=sequence_parallel
    )
    ranks = workers.run(2, _ours, args, 0.8, 10, entropy_gradient)
    expected = _plain(0.8, entropy_gradient=entropy_gradient)
    assert _worst(ranks, expected, sequence_parallel=sequence_parallel) < 1e-5
    # controls: padding rows in the softmax, and the opposite entropy gradient
    padded = _plain(0.8, entropy_gradient=entropy_gradient, vocab=PADDED)
    assert _worst(ranks, padded, sequence_parallel=sequence_parallel) > 1e-3
    other = _plain(0.8, entropy_gradient=not entropy_gradient)
    assert _worst(ranks, other, sequence_parallel=sequence_parallel) > 1e-3


def test_a_rank_that_holds_only_padding(workers: WorkerPool, tmp_path: Path) -> None:
    args = tiny.make_args(tiny.hf_dir(tmp_path, "qwen3"), tensor_model_parallel_size=4)
    ranks = workers.run(4, _ours, args, 0.8, 10, True)  # 32 rows per rank: the last one starts after the vocabulary
    assert tiny.VOCAB < 3 * PADDED // 4
    assert _worst(ranks, _plain(0.8, entropy_gradient=True), sequence_parallel=False) < 1e-5
