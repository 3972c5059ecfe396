"""Layouts on several GPUs over NCCL against one GPU, and attention of all context-parallel ranks played by one GPU.

In fp32 a layout may differ from one GPU by the order of its sums. In bf16 both differ from the fp32 result, and a
layout's error may not be much larger than that of one GPU.
"""

from __future__ import annotations

import tempfile
import traceback
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slime.config.args import Args
from slime.core.architecture import Architecture
from slime.core.batch import TrainBatch
from tests.gpu.checks import Report, check
from tests.megatron import tiny
from tests.worker_pool import WorkerPool

DEVICE = "cuda"
LENGTHS = (3, 129, 256, 31, 1, 400, 90, 64)
"""Response lengths: shorter than a chunk, at a kernel's block size, and above it."""
FLAGS: dict[str, Any] = {
    "lr": 1e-2,
    "adam_eps": 1e-3,  # a small one makes Adam's first step lr x sign(gradient): full steps even for mere rounding
    "clip_grad": 0.5,
    "use_kl_loss": True,
    "kl_loss_coef": 0.1,
    "kl_loss_type": "k3",
    "entropy_coef": 0.01,
    "max_tokens_per_gpu": 512,
    "train_timeout": 120.0,
}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP 2, sequence parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP 2": {"pipeline_model_parallel_size": 2},
    "CP 2, recompute": {"context_parallel_size": 2, **RECOMPUTE},
    "DP 2, distributed optimizer": {"use_distributed_optimizer": True},
}
"""The layouts of two GPUs."""
LAYOUTS_OF_4: dict[str, dict[str, Any]] = {
    "TP 2 x CP 2, sequence parallel, distributed optimizer, recompute": {
        "tensor_model_parallel_size": 2,
        "context_parallel_size": 2,
        "sequence_parallel": True,
        "use_distributed_optimizer": True,
        **RECOMPUTE,
    },
    "PP 2 x CP 2": {"pipeline_model_parallel_size": 2, "context_parallel_size": 2},
    "DP 2 x CP 2, distributed optimizer": {"context_parallel_size": 2, "use_distributed_optimizer": True},
    "CP 4": {"context_parallel_size": 4},
}


@dataclass(frozen=True)
class Stepped:
    """The results of one optimizer step on one rank."""

    log_probs: np.ndarray
    loss: float
    norm: float
    weights: dict[str, np.ndarray]
    """The weights after the step, by HF name."""

    def fingerprint(self) -> tuple[float, float, int]:
        bits = 0
        for name in sorted(self.weights):
            bits = zlib.crc32(self.weights[name].tobytes(), bits)
        return self.loss, self.norm, zlib.crc32(self.log_probs.tobytes(), bits)


def step(rank: int, world_size: int, init_method: str, args: Args, batch: TrainBatch) -> Stepped:
    """Run on every rank: load, compute log-probs, take one step."""
    from slime.megatron.trainer import Trainer

    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        log_probs = trainer.log_probs(batch)
        metrics = trainer.train(0, batch)
        weights = {name: tensor.float().cpu().numpy() for name, tensor in trainer.iter_hf_tensors()}
        return Stepped(log_probs, metrics["train/loss"], metrics["train/grad_norm"], weights)
    finally:
        trainer.close()


def relative(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """Return the largest difference of any entry, relative to the largest entry of its tensor."""
    return max(float(np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max()) for name in expected)


def mean_gap(found: Stepped, exact: Stepped) -> float:
    return float(np.abs(found.log_probs - exact.log_probs).mean())


def compare(report: Report, what: str, found: Stepped, alone: Stepped, exact: Stepped, *, bf16: bool) -> None:
    """Compare a layout with one GPU in the same dtype (`alone`) and in fp32 (`exact`)."""
    log_probs = relative({"": found.log_probs}, {"": alone.log_probs})
    loss, norm = abs(found.loss / alone.loss - 1), abs(found.norm / alone.norm - 1)
    weights = relative(found.weights, alone.weights)
    figures = f"log-probs {log_probs:.1e}, loss {loss:.1e}, norm {norm:.1e}, weights {weights:.1e}"
    if not bf16:
        report.row(what, figures, "1e-5 each", max(log_probs, loss, norm, weights) <= 1e-5)
        return
    gap, allowed = mean_gap(found, exact), mean_gap(alone, exact)
    ok = gap <= 1.5 * allowed and norm <= 3e-2 and weights <= 2e-2
    limit = f"gap 1.5 x {allowed:.1e}, norm 3e-2, weights 2e-2"
    report.row(what, f"{figures}; gap to fp32 {gap:.1e}", limit, ok)


def against_one_gpu(
    report: Report, families: Iterable[str], layouts: Mapping[str, dict[str, Any]], num_gpus: int
) -> None:
    batch = tiny.random_batch(lengths=LENGTHS, with_rollout=False)
    pool = WorkerPool(own_imports=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for family in families:
                actor, reference = (
                    tiny.hf_dir(Path(folder) / family / name, family, seed=seed)
                    for seed, name in enumerate(("actor", "reference"))
                )

                def run(bf16: bool, layout: Mapping[str, Any], num_ranks: int, paths: tuple[Path, Path]) -> Stepped:
                    flags = {**FLAGS, "load": str(paths[0]), "ref_load": str(paths[1]), "bf16": bf16, **layout}
                    found = pool.run(num_ranks, step, tiny.make_args(paths[0], **flags), batch, timeout=150.0)
                    assert len({stepped.fingerprint() for stepped in found}) == 1, "ranks came to different results"
                    return found[0]

                alone = {bf16: run(bf16, {}, 1, (actor, reference)) for bf16 in (False, True)}
                bf16_gap = mean_gap(alone[True], alone[False])
                report.row(
                    f"{family}, one GPU: log-prob gap of bf16 to fp32", bf16_gap, "> 1e-4, a control", bf16_gap > 1e-4
                )
                for name, layout in layouts.items():
                    for bf16 in (False, True):
                        what = f"{family}, {name}, {'bf16' if bf16 else 'fp32'}"
                        try:
                            found = run(bf16, layout, num_gpus, (actor, reference))
                        except (RuntimeError, TimeoutError, AssertionError) as error:
                            traceback.print_exc()
                            report.fail(what, str(error).strip().splitlines()[-1][:200])
                            continue
                        compare(report, what, found, alone[bf16], alone[False], bf16=bf16)
    finally:
        pool.close()


@check(gpus=2, minutes=8)
def two(report: Report) -> None:
    """Check TP, PP, CP, and DP with the distributed optimizer on two GPUs, for all families."""
    against_one_gpu(report, tiny.FAMILIES, LAYOUTS, 2)


@check(gpus=4, minutes=5)
def four(report: Report) -> None:
    """Check context parallelism together with every other kind of parallelism on four GPUs."""
    against_one_gpu(report, ("glm4",), LAYOUTS_OF_4, 4)


def shape_of(heads: int, groups: int, channels: int) -> Architecture:
    return Architecture(
        family="qwen3",
        num_layers=1,
        hidden_size=heads * channels,
        ffn_hidden_size=64,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=channels,
        vocab_size=64,
        max_position_embeddings=65536,
        norm_epsilon=1e-6,
        rotary_base=1e6,
    )


class Played:
    """Plays the attention of `num_ranks` ranks, one after another in this process."""

    def __init__(self, lengths: list[int], num_ranks: int, arch: Architecture) -> None:
        from slime.megatron.microbatch import ContextParallel, Cut
        from slime.megatron.model.attention import pack_sequences

        multiple = ContextParallel(0, num_ranks).row_multiple
        padded_S = np.array([length + -length % multiple for length in lengths])
        starts_S = np.cumsum(padded_S) - padded_S
        cut = Cut.of(padded_S, num_ranks)
        self.num_padded = int(padded_S.sum())
        self.real = torch.from_numpy(
            np.concatenate([start + np.arange(length) for start, length in zip(starts_S, lengths, strict=True)])
        ).to(DEVICE)
        self.tokens_CB = torch.from_numpy(cut.tokens_CB).to(DEVICE)
        parts = [ContextParallel(rank, num_ranks) for rank in range(num_ranks)]
        self.packed = [pack_sequences(cut.lengths_P.tolist(), arch, cut.share(part)) for part in parts]

    def split(self, x: Tensor) -> list[Tensor]:
        """Return each rank's tokens; padding is filled with numbers that no query may see."""
        pack = x.new_full((self.num_padded, *x.shape[1:]), 30.0).index_copy(0, self.real, x)
        return [pack[tokens_B] for tokens_B in self.tokens_CB]

    def attend(self, rank: int, query: Tensor, row: Tensor) -> Tensor:
        from slime.megatron.model.attention import attend, keys_of_pieces

        packed = self.packed[rank]
        assert packed.share is not None
        return attend(query, *keys_of_pieces(row, len(query), packed.share), packed, None)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        queries, keys, values = (self.split(x) for x in (query, key, value))
        row = torch.cat([x for pair in zip(keys, values, strict=True) for x in pair])
        out = query.new_empty((self.num_padded, *query.shape[1:]))
        for rank, tokens_B in enumerate(self.tokens_CB):
            out = out.index_copy(0, tokens_B, self.attend(rank, queries[rank], row))
        return out[self.real]


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def with_gradients(function: Any, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def largest(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Return, for the output and each gradient, the largest error relative to the largest entry."""
    return [
        float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in zip(found, exact, strict=True)
    ]


def milliseconds(function: Any) -> float:
    for _ in range(3):
        function()
    times: list[float] = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


@check(gpus=1, minutes=4)
def pieces(report: Report) -> None:
    """Compare attention of sequences cut for context parallelism, on one GPU, with whole sequences."""
    from slime.megatron.model.flash_attention import Case, choose

    kernel, _ = choose(Case(torch.cuda.get_device_capability(), torch.bfloat16, 128))
    report.row("the kernel for heads of 128 in bf16", kernel.name)
    cut_against_whole(report)
    speed(report)


def cut_against_whole(report: Report) -> None:
    from slime.megatron.model.attention import attend, pack_sequences
    from slime.megatron.model.flash_attention import attend_each

    for heads, groups, channels, lengths in (
        (4, 2, 16, [33, 5, 1, 18]),
        (16, 8, 128, [1, 7, 130, 1000, 2049, 3]),
        (16, 1, 128, [700, 4097]),
    ):
        arch = shape_of(heads, groups, channels)
        packed = pack_sequences(lengths, arch)
        assert packed.cu_seqlens_q is not None
        ends = packed.cu_seqlens_q

        def each(q: Tensor, k: Tensor, v: Tensor, ends: Tensor = ends) -> Tensor:
            return attend_each(q, k, v, ends, ends, None)

        def whole(q: Tensor, k: Tensor, v: Tensor, packed: Any = packed) -> Tensor:
            return attend(q, k, v, packed, None)

        for dtype in (torch.float32, torch.bfloat16):
            inputs = [draw(sum(lengths), n, channels, seed=n, dtype=dtype) for n in (heads, groups, groups)]
            upstream = draw(sum(lengths), heads, channels, seed=99, dtype=dtype)
            exact = with_gradients(each, [x.double() for x in inputs], upstream)
            alone = largest(with_gradients(whole, inputs, upstream), exact)
            for num_ranks in (2, 4):
                found = largest(with_gradients(Played(lengths, num_ranks, arch), inputs, upstream), exact)
                what = f"{heads}/{groups} heads of {channels}, CP {num_ranks}, {dtype}: output, dq, dk, dv"
                # gradients of keys and values are sums over several pieces, each of them rounded
                allowed = [max(times * error, 1e-5) for times, error in zip((2, 2, 4, 4), alone, strict=True)]
                ok = all(error <= most for error, most in zip(found, allowed, strict=True))
                report.row(what, words(found), f"{words(allowed)}; whole: {words(alone)}", ok)
            wrong = Played([*lengths[:-1], lengths[-1] + 4], 2, arch)
            wrong.real = wrong.real[1 : sum(lengths) + 1]
            miss = largest([wrong(*inputs)], exact[:1])[0]
            report.row("control, has to be noticed: sequences that begin one token late", miss, "> 0.05", miss > 0.05)


def words(errors: list[float]) -> str:
    return " ".join(f"{error:.1e}" for error in errors)


def speed(report: Report) -> None:
    """Time forward and backward of one long sequence, whole and as each rank has it, without the gather."""
    from slime.megatron.model.attention import attend, pack_sequences

    heads, groups, channels, length = 16, 8, 128, 32768
    arch = shape_of(heads, groups, channels)
    query, key, value = (
        draw(length, n, channels, seed=n, dtype=torch.bfloat16).requires_grad_() for n in (heads, groups, groups)
    )
    whole = pack_sequences([length], arch)
    upstream = torch.ones_like(query)
    alone = milliseconds(
        lambda: torch.autograd.grad(attend(query, key, value, whole, None), (query, key, value), upstream)
    )
    report.row(f"attention of {length} tokens, whole", f"{alone:.2f} ms")
    for num_ranks in (2, 4):
        played = Played([length], num_ranks, arch)
        times: list[float] = []
        for rank in range(num_ranks):
            part = query[: length // num_ranks].detach().requires_grad_()
            row = torch.cat([key, value]).detach().requires_grad_()
            ones = torch.ones_like(part)
            times.append(
                milliseconds(
                    lambda rank=rank, part=part, row=row, ones=ones, played=played: torch.autograd.grad(
                        played.attend(rank, part, row), (part, row), ones
                    )
                )
            )
        shown = ", ".join(f"{value:.2f}" for value in times)
        even = max(times) <= 1.25 * min(times)
        report.row(f"the same at CP {num_ranks}, each rank", f"{shown} ms", f"{alone / num_ranks:.2f} ms; even", even)
