"""Weights that are not finite are never sent as a whole set, and are named, whichever rank holds them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from worker_pool import WorkerPool

from slime.core.errors import RunError
from slime.engine.bucket_layout import NamedTensor
from slime.sync.finite import finite
from tests.engine.tiny_models import make_model
from tests.megatron.tiny import make_args


def some_weights() -> dict[str, torch.Tensor]:
    weights = {f"w{i}": torch.full((3, 5), float(i), dtype=torch.bfloat16) for i in range(6)}
    return {**weights, "empty": torch.zeros(0), "counts": torch.tensor([1, 2])}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_set_with_nan_never_ends(value: float) -> None:
    weights = some_weights()
    assert len(list(finite(lambda: weights.items(), described=lambda: "the weights"))) == 8, "control: all are finite"
    weights["w3"][1, 2] = weights["w5"][0, 0] = weights["w5"][2, 4] = value
    sent: list[NamedTensor] = []
    with pytest.raises(RunError, match=r"^the weights: 2 weights .*: w3 \(1 of 15 values\), w5 \(2 of 15 values\)\. "):
        sent.extend(finite(lambda: weights.items(), described=lambda: "the weights"))
    for number in range(6):
        weights[f"w{number}"].fill_(value)
    with pytest.raises(RunError, match=r"w0 \(15 .*, and 2 more weights"):
        sent.extend(finite(lambda: weights.items(), described=lambda: "the weights"))


def stream_on_one_of_two(rank: int, world_size: int, init_method: str) -> str:
    """Return the error that this rank raises; only rank 1 holds the bad value."""
    dist.init_process_group("gloo", rank=rank, world_size=world_size, init_method=init_method)
    weights = some_weights()
    try:
        for _ in finite(lambda: weights.items(), described=lambda: "the weights"):
            continue  # control: no rank raises, and none waits for the other
        weights["w2"][0, 0] = math.inf if rank == 1 else 0.0
        for _ in finite(lambda: weights.items(), described=lambda: "the weights"):
            continue
    except RunError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
    return ""


def test_all_ranks_name_one_ranks_bad_weights(workers: WorkerPool) -> None:
    errors = workers.run(2, stream_on_one_of_two)
    assert "w2 (1 of 15 values)" in errors[0]
    assert errors[0] == errors[1]


def send_first_weights(rank: int, world_size: int, init_method: str, args: Any, log_dir: str) -> str:
    """Return a trainer's errors at its start and at its first weight sync, before any rollout."""
    from slime.cluster.workers import TrainWorker
    from slime.megatron.parallel import close_parallel

    kind: Any = TrainWorker.__ray_metadata__.modified_class  # pyright: ignore
    worker = kind(args, rank, init_method, log_dir)
    try:
        worker.load()
        worker.send_weights(1)
    except RunError as error:
        return str(error)
    finally:
        close_parallel()
    return ""


@pytest.mark.dist
def test_a_trainer_names_a_checkpoints_bad_weights(workers: WorkerPool, tmp_path: Path) -> None:
    """Test NaN in the files, and a finite value there that does not fit bf16, with engines and without."""
    model = make_model(tmp_path / "hf", "glm4", seed=1)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"

    def error(value: float, *, engines: int, **options: Any) -> str:
        tensors[name][0, :2] = value
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        args = make_args(model, rollout_num_gpus=engines, check_weight_sync=False, **options)
        [message] = workers.run(1, send_first_weights, args, str(tmp_path))
        return message

    found = f"{name} (2 of {tensors[name].numel()} values)"
    message = error(math.nan, engines=0)
    assert f"the actor's weights, loaded from {model}" in message and found in message
    assert found in error(3.4e38, engines=1, bf16=True)
    assert error(3.4e38, engines=1) == "", "control: fp32 holds it"
