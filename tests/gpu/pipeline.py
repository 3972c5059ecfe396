"""Pipeline stages on two GPUs: the host waits for no device between them, and results are the same.

The control lets Megatron's communicator ask for every shape, as it does without a plan.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from slime.config.args import Args
from slime.core.batch import TrainBatch
from tests.gpu.checks import Report, check
from tests.gpu.layouts import FLAGS
from tests.megatron import tiny
from tests.worker_pool import WorkerPool

LENGTHS = (3, 129, 256, 31, 1, 400, 90, 64, 300, 200, 17, 380)
LAYOUTS: dict[str, dict[str, Any]] = {
    "PP 2": {"pipeline_model_parallel_size": 2},
    "PP 2 x VPP 2": {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
}
BETWEEN_STAGES = ("p2p_communication.py", "schedules.py", "pipeline.py")
STEPS = 8


@dataclass(frozen=True)
class Found:
    """One rank's result: the places of waits in a step, seconds a step, and the losses and norms of all steps."""

    waits: list[str]
    seconds: float
    steps: list[tuple[float, float]]


@contextmanager
def asking() -> Iterator[None]:
    """Let Megatron's communicator ask its neighbours for the shapes."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from slime.megatron.pipeline import PlannedCommunicator

    own = P2PCommunicator._communicate_shapes
    with patch.object(PlannedCommunicator, "_communicate_shapes", own), patch.object(PlannedCommunicator, "finish"):
        yield


def steps_of(rank: int, world_size: int, init_method: str, args: Args, batch: TrainBatch, asks: bool) -> Found:
    from slime.megatron.trainer import Trainer
    from tests.gpu.fused import waits

    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        steps: list[tuple[float, float]] = []
        seconds: list[float] = []

        def one() -> None:
            metrics = trainer.train(len(steps), batch)
            steps.append((metrics["train/loss"], metrics["train/grad_norm"]))

        with asking() if asks else nullcontext():
            for _ in range(STEPS):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                one()
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - begin)
            places = waits(one)
        return Found(places, statistics.median(seconds[2:]), steps)
    finally:
        trainer.close()


@check(gpus=2, minutes=4)
def shapes(report: Report) -> None:
    """Check that no stage waits for its device to learn a shape, and that the steps stay the same."""
    batch = tiny.random_batch(len(LENGTHS), lengths=LENGTHS, with_rollout=False)
    pool = WorkerPool(own_imports=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            hf = tiny.hf_dir(Path(folder) / "model", "qwen3", num_layers=4)
            for name, layout in LAYOUTS.items():
                flags = {**FLAGS, "use_kl_loss": False, "kl_loss_coef": 0.0, "lr": 1e-5}
                args = tiny.make_args(hf, **flags, load=str(hf), bf16=True, **layout)
                found = {asks: pool.run(2, steps_of, args, batch, asks, timeout=100.0) for asks in (False, True)}
                waited = {asks: _between(ranks) for asks, ranks in found.items()}
                report.row(f"{name}: waits between stages", len(waited[False]), "0", not waited[False])
                report.row(f"{name}: Megatron's own", len(waited[True]), "> 0, a control", bool(waited[True]))
                ours, own = found[False][0].steps, found[True][0].steps
                report.row(f"{name}: first loss", ours[0][0], f"{own[0][0]}, to the bit", ours[0][0] == own[0][0])
                # attention's backward pass adds in any order
                gap = float((np.abs(np.array(ours) - np.array(own)) / [1.0, own[0][1]]).max())
                report.row(f"{name}: losses, norms of {STEPS + 1} steps", f"{gap:.1e}", "2e-2", gap <= 2e-2)
                times = [1e3 * max(rank.seconds for rank in found[asks]) for asks in (False, True)]
                report.row(f"{name}: a step", f"{times[0]:.1f} ms", f"{times[1]:.1f} ms when stages ask for shapes")
    finally:
        pool.close()


def _between(ranks: list[Found]) -> list[str]:
    """Return the places of all ranks' waits that are between stages."""
    return [place for rank in ranks for place in rank.waits if place.startswith(BETWEEN_STAGES)]
