"""A tiny model trained on made-up gradients: only a parameter's name decides its step, in every parallel layout."""

from __future__ import annotations

import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slime.config.args import Args
from slime.core.architecture import Architecture, padded_vocab_size
from slime.megatron.checkpoint.files import find_checkpoint
from slime.models.families import weight_table

GLM4 = Architecture(
    family="glm4",
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=37,  # padded to 40 at TP 1, to 48 at TP 2
    max_position_embeddings=64,
    norm_epsilon=1e-5,
    rotary_base=1e4,
    rotary_percent=0.5,
    rotary_interleaved=True,
    add_qkv_bias=True,
    post_self_attn_layernorm=True,
    post_mlp_layernorm=True,
)
STATE = {"cursor": {"epoch": 1, "order": [3, 1, 2]}, "log_prob": 0.1 + 0.2, "failed": float("nan")}


def make_args(save: Path | None, tp: int = 1, **changes: Any) -> Args:
    """Return arguments without clipping: a step is then elementwise, and equal in every layout to the last bit."""
    flags: dict[str, Any] = {
        "save": None if save is None else str(save),
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
        "make_vocab_size_divisible_by": 8,
        "architecture": GLM4,
        "lr": 1e-2,
        "lr_decay_style": "linear",
        "lr_decay_iters": 10,
        "clip_grad": 0.0,
        "num_rollout": 10,
        "num_steps_per_rollout": 1,
    }
    return Args(**{**flags, **changes})


def drawn(name: str, step: int, shape: tuple[int, ...]) -> Tensor:
    """Draw a whole tensor that depends on its name and `step` only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode())))


class Run:
    """A model with its optimizer, trained on made-up gradients."""

    def __init__(self, args: Args, topology: Any) -> None:
        from slime.megatron.model.build import build_model, named_parameters
        from slime.megatron.optim.optimizer import build_optimizer

        assert args.architecture is not None
        self.args, self.topology, self.architecture = args, topology, args.architecture
        self.table = weight_table(self.architecture)
        self.model = build_model(args, wrap=True)
        self.optimizer, self.scheduler = build_optimizer(args, self.model)
        self.parameters = dict(named_parameters(self.model))

    def shard(self, name: str, step: int) -> Tensor:
        """Return this rank's part of a whole made-up tensor."""
        size = padded_vocab_size(self.architecture.vocab_size, 8, self.topology.tp_size)
        shape = list(self.parameters[name].shape)
        axis = self.table.rule(name).tp_axis
        if axis is not None:
            shape[axis] *= self.topology.tp_size
        if "embedding" in name or "output_layer" in name:
            shape[0] = self.architecture.vocab_size
        full = self.table.pad(name, drawn(name, step, tuple(shape)), size)
        return self.table.split(name, full, self.topology.tp_size, self.topology.tp_rank)

    def initialize(self) -> None:
        from slime.megatron.compat import cpu_layer

        with torch.no_grad(), cpu_layer.layer():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.shard(name, -1))
            self.optimizer.reload_model_params()

    def step(self, number: int) -> None:
        from slime.megatron.compat import cpu_layer

        with cpu_layer.layer():
            self.optimizer.zero_grad()
            for name, parameter in self.parameters.items():
                parameter.main_grad.copy_(self.shard(name, number))  # pyright: ignore
            self.optimizer.step()
            self.scheduler.step(1)

    def draws(self) -> list[float]:
        """Draw one number from every generator."""
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        tracker = get_cuda_rng_tracker()
        assert tracker is not None
        with tracker.fork():
            inside = torch.rand(1).item()
        return [random.random(), np.random.rand(), torch.rand(1).item(), inside]

    def weights(self) -> dict[str, Tensor]:
        from slime.megatron.model.hf_weights import iter_hf_tensors

        return {name: tensor.clone() for name, tensor in iter_hf_tensors(self.model, self.architecture)}

    def save(self, rollout_id: int, state: dict[str, Any] = STATE) -> Path:
        return self.snapshot(rollout_id, state).write()

    def snapshot(self, rollout_id: int, state: dict[str, Any] = STATE, *, staging: Any = None) -> Any:
        from slime.megatron.checkpoint.save_load import take_checkpoint

        assert self.args.save is not None
        return take_checkpoint(
            self.args.save,
            rollout_id=rollout_id,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            state=state,
            keep_last=self.args.keep_last_checkpoints,
            staging=staging,
        )

    def load(self, path: Path, *, optimizer: bool = True, rng: bool = True) -> Any:
        from slime.megatron.checkpoint.save_load import load_checkpoint

        found = find_checkpoint(path)
        assert found is not None
        return load_checkpoint(
            found,
            model=self.model,
            optimizer=self.optimizer if optimizer else None,
            scheduler=self.scheduler,
            load_rng=rng,
        )


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    assert ours.keys() == theirs.keys()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
