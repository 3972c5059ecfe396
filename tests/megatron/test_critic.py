"""The critic: its steps against transformers and torch's AdamW at every layout, its checkpoints, and that it learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import torch
import torch.distributed as dist
from runs import Arrays, difference
from torch import Tensor
from worker_pool import WorkerPool

from slime.config.args import Args
from slime.core.batch import TrainBatch
from slime.megatron.checkpoint.save_load import CRITIC, find_checkpoint
from slime.megatron.model.build import VALUE_HEAD, named_parameters
from slime.megatron.trainer import Trainer
from slime.models.families import weight_table

pytestmark = pytest.mark.dist

TOLERANCE = 1e-5
STEP_TOLERANCE = 1e-3
"""The tolerance of a difference, relative to what a step moves."""
FLAGS: dict[str, Any] = {
    "advantage_estimator": "ppo",
    "gamma": 0.97,
    "lambd": 0.9,
    "value_clip": 0.02,  # so small that some tokens of a later step are clipped
    "lr": 1e-3,
    "critic_lr": 1e-2,
    "adam_eps": 1e-3,  # a small one makes Adam's first step lr x sign(gradient): full steps even for mere rounding
    "weight_decay": 0.1,
    "clip_grad": 0.0,
    "num_steps_per_rollout": 2,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "TP2, sequence parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "CP2": (2, {"context_parallel_size": 2, "max_tokens_per_gpu": 40}),
    "DP2, distributed optimizer": (2, {"use_distributed_optimizer": True}),
}
BATCHES = [tiny.random_batch(seed=seed, with_rollout=False) for seed in (0, 1)]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tied model: its output layer is the embedding, which the critic has nevertheless."""
    return tiny.hf_dir(tmp_path_factory.mktemp("hf"), "qwen2")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_dir(tmp_path_factory.mktemp("untied"), "qwen3")


def critic_weights(trainer: Trainer) -> Arrays:
    """Return whole weights of all stages by HF name; the value head has its own name."""
    assert trainer.critic is not None
    table, found = weight_table(trainer._arch), dict[str, np.ndarray]()
    for name, parameter in named_parameters(trainer.critic.model):
        full: Any = parameter.detach().clone()
        if name == VALUE_HEAD:
            found[name] = full.float().numpy()
            continue
        if table.rule(name).tp_axis is not None and trainer.topology.tp_size > 1:
            shards: list[Any] = [None] * trainer.topology.tp_size
            dist.all_gather_object(shards, full, group=trainer.topology.tp_group)
            full = table.join(name, shards)
        found |= {hf_name: tensor.float().numpy() for hf_name, tensor in table.to_hf(name, full)}
    stages: list[Any] = [None] * trainer.topology.pp_size
    dist.all_gather_object(stages, found, group=trainer.topology.pp_group)
    return {name: weight for stage in stages for name, weight in stage.items()}


def values_of(trainer: Trainer, batch: TrainBatch) -> np.ndarray:
    assert trainer.critic is not None
    share = trainer.share(batch, 1)
    own_R = trainer._forward(share.own, share.batch.steps, trainer.critic.values)
    return share.whole({**share.own.columns, "values": own_R}).columns["values"]


Found = tuple[list[dict[str, float]], Arrays, np.ndarray, Arrays]
"""Metrics; the critic's weights and its values of the last batch after all steps; the policy's weights."""


def outcome(trainer: Trainer, metrics: list[dict[str, float]]) -> Found:
    return metrics, critic_weights(trainer), values_of(trainer, BATCHES[-1]), runs.weights(trainer)


def train(rank: int, world_size: int, init_method: str, args: Args, batches: list[TrainBatch]) -> Found:
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        return outcome(trainer, [trainer.train(number, batch) for number, batch in enumerate(batches)])
    finally:
        trainer.close()


# --- by hand ----------------------------------------------------------------------------------------------------


def gae_by_hand(score: float, mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the returns A + V over the counted tokens, computed backwards (arXiv:1506.02438)."""
    returns, following, advantage = np.zeros(len(mask)), 0.0, 0.0
    for t in reversed(np.flatnonzero(mask).tolist()):
        delta = (score if following == 0.0 and advantage == 0.0 else 0.0) + FLAGS["gamma"] * following - values[t]
        advantage = delta + FLAGS["gamma"] * FLAGS["lambd"] * advantage
        returns[t], following = advantage + values[t], values[t]
    return returns


def by_hand(hf: Path, args: Args, steps: list[list[list[int]]]) -> tuple[Arrays, np.ndarray]:
    """Return weights and values after all batches; `steps` lists, for each batch, the rows of each step."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).model
    head = torch.nn.Parameter(torch.zeros(1, model.config.hidden_size))
    named = {**{f"model.{name}": parameter for name, parameter in model.named_parameters()}, VALUE_HEAD: head}
    decayed = [parameter for parameter in named.values() if parameter.dim() > 1]
    plain = [parameter for parameter in named.values() if parameter.dim() == 1]
    assert args.critic_lr is not None
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=args.critic_lr,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_eps,
    )

    def values(batch: TrainBatch, row: int) -> Tensor:
        tokens, length = torch.from_numpy(batch.rows("tokens")[row]), int(batch.response_lengths_N[row])
        return (model(tokens[None]).last_hidden_state[0, -length - 1 : -1] @ head.T)[:, 0]

    for batch, rows_of_steps in zip(BATCHES, steps, strict=True):
        masks = batch.rows("loss_mask")
        with torch.no_grad():
            old = [values(batch, row) for row in range(len(batch))]
        returns = [
            torch.from_numpy(gae_by_hand(float(score), masks[row], old[row].double().numpy())).float()
            for row, score in enumerate(batch.columns["rewards"])
        ]
        for rows in rows_of_steps:
            losses: list[Tensor] = []
            for row in rows:
                now, mask = values(batch, row), torch.from_numpy(masks[row])
                near = old[row] + (now - old[row]).clamp(-args.value_clip, args.value_clip)
                per_token = torch.maximum((now - returns[row]) ** 2, (near - returns[row]) ** 2) / 2
                losses.append((per_token * mask).sum() / mask.sum())
            adam.zero_grad()
            torch.stack(losses).mean().backward()
            adam.step()
    with torch.no_grad():
        last = torch.cat([values(BATCHES[-1], row) for row in range(len(BATCHES[-1]))]).numpy()
    return {name: parameter.detach().numpy().copy() for name, parameter in named.items()}, last


def rows_of_steps(rank: int, world_size: int, init_method: str, args: Args) -> list[list[list[int]]]:
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        steps = [trainer.share(batch, 2).batch.step_N for batch in BATCHES]
        return [[np.flatnonzero(step_N == number).tolist() for number in range(2)] for step_N in steps]
    finally:
        trainer.close()


def test_steps_match_hand_computation_in_every_layout(workers: WorkerPool, hf: Path) -> None:
    args = tiny.make_args(hf, **FLAGS)
    metrics, weights, values, policy = workers.run(1, train, args, BATCHES)[0]
    expected, last = by_hand(hf, args, workers.run(1, rows_of_steps, args)[0])
    start = {**{name: tensor.numpy() for name, tensor in _hf_tensors(hf).items()}, VALUE_HEAD: np.zeros((1, 64))}
    moved = max(float(np.abs(expected[name] - start[name]).max()) for name in expected)
    assert moved > 0.01
    for name in expected:
        assert np.abs(weights[name] - expected[name]).max() < STEP_TOLERANCE * moved, name
    assert np.abs(values - last).max() < TOLERANCE * 10 and np.abs(values).max() > 0.05
    assert 0 < metrics[-1]["critic/clip_fraction"] < 1
    assert metrics[0]["critic/lr"] == 1e-2 and metrics[0]["train/lr"] == 1e-3
    assert metrics[0]["critic/value_mean"] == 0 and metrics[-1]["critic/value_mean"] != 0
    for layout, (world_size, flags) in LAYOUTS.items():
        results = workers.run(world_size, train, replace(args, **flags), BATCHES)
        for ours, critic, seen, actor in results:
            assert np.abs(seen - values).max() < TOLERANCE, layout
            assert difference(critic, weights) < TOLERANCE, layout
            assert difference(actor, policy) < TOLERANCE, layout
            for mine, theirs in zip(ours, metrics, strict=True):
                for name in theirs:
                    if name.startswith("critic/"):
                        assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), (layout, name)
    # controls: the comparison notices another clip, another lambda, and the policy's rate in the critic
    for change in ({"value_clip": 0.0}, {"lambd": 1.0}, {"critic_lr": 1e-3}):
        _, other, _, _ = workers.run(1, train, replace(args, **change), BATCHES)[0]
        assert difference(other, weights) > 10 * TOLERANCE, change


def _hf_tensors(hf: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(hf / "model.safetensors")


# --- learning ---------------------------------------------------------------------------------------------------


def scored_by_the_prompt(seed: int) -> TrainBatch:
    """Make a batch whose score depends on the first token of the prompt."""
    batch = tiny.random_batch(16, seed=seed, with_rollout=False, lengths=[6] * 16)
    tokens = batch.columns["tokens"].copy()
    starts = np.cumsum(batch.total_lengths_N) - batch.total_lengths_N
    kinds = np.random.default_rng(seed).integers(0, 2, 16)
    tokens[starts] = 5 + kinds
    return batch.with_column("tokens", tokens).with_column("rewards", kinds.astype(np.float32))


def test_the_critic_learns_while_the_policy_waits(workers: WorkerPool, hf: Path) -> None:
    flags = {"num_critic_only_steps": 8, "num_steps_per_rollout": 1, "value_clip": 0.0, "critic_lr": 5e-3}
    args = tiny.make_args(hf, **{**FLAGS, **flags}, max_tokens_per_gpu=1024)
    args = replace(args, gamma=1.0, lambd=1.0, adam_eps=1e-8, weight_decay=0.0)
    batches = [scored_by_the_prompt(seed) for seed in range(9)]
    metrics, _, _, policy = workers.run(1, train, args, batches[:8])[0]
    explained = [each["critic/explained_variance"] for each in metrics]
    assert explained[0] == pytest.approx(0, abs=1e-6) and explained[-1] > 0.5, explained
    assert metrics[-1]["critic/loss"] < metrics[0]["critic/loss"] / 2
    start = {name: tensor.numpy() for name, tensor in _hf_tensors(hf).items()}
    assert all(np.array_equal(policy[name], start[name]) for name in policy), "the policy did not wait"
    assert not any(name in each for each in metrics for name in ("train/loss", "train/lr"))
    metrics, _, _, policy = workers.run(1, train, args, batches)[0]
    assert "train/loss" in metrics[8] and not all(np.array_equal(policy[name], start[name]) for name in policy)


# --- checkpoints ------------------------------------------------------------------------------------------------


def saved_run(rank: int, world_size: int, init_method: str, args: Args, first: int, last: int) -> Found:
    """Load, then train on rollouts `first` to `last`, and save after each."""
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        assert trainer.load().next_rollout_id == first
        metrics: list[dict[str, float]] = []
        for rollout_id in range(first, last + 1):
            metrics.append(trainer.train(rollout_id, BATCHES[rollout_id % 2]))
            trainer.save(rollout_id, {})
        return outcome(trainer, metrics)
    finally:
        trainer.close()


def same(ours: Found, theirs: Found) -> bool:
    critics = all(np.array_equal(ours[1][name], theirs[1][name]) for name in theirs[1])
    return critics and all(np.array_equal(ours[3][name], theirs[3][name]) for name in theirs[3])


def critic_metrics(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in each.items() if name.startswith("critic/")} for each in metrics]


def make_saving(hf: Path, directory: Path, **flags: Any) -> Args:
    return tiny.make_args(hf, **{**FLAGS, "save": str(directory), "load": str(directory), **flags})


@pytest.mark.parametrize("bf16", [False, True])
def test_a_resumed_run_loses_nothing(workers: WorkerPool, hf: Path, tmp_path: Path, bf16: bool) -> None:
    flags = {"use_distributed_optimizer": bf16, "bf16": bf16, "lr_decay_style": "cosine", "critic_lr_warmup_iters": 3}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    unbroken = workers.run(2, saved_run, make_saving(hf, whole, **flags), 0, 2)[0]
    workers.run(2, saved_run, make_saving(hf, broken, **flags), 0, 1)
    args = make_saving(hf, broken, **flags, keep_last_checkpoints=1)
    resumed = workers.run(2, saved_run, args, 2, 2)[0]
    assert same(resumed, unbroken)
    assert critic_metrics(resumed[0]) == critic_metrics(unbroken[0][-1:])
    assert [path.name for path in broken.glob("iter_*")] == ["iter_0000002"], "one unit, removed together"
    if not bf16:  # control: the optimizer's state matters for the next steps
        restarted = make_saving(hf, whole, **flags, ckpt_step=1, no_load_optim=True, save=str(tmp_path / "restarted"))
        assert not same(workers.run(2, saved_run, restarted, 2, 2)[0], unbroken)


def test_a_checkpoint_with_an_incomplete_critic_is_skipped(workers: WorkerPool, hf: Path, tmp_path: Path) -> None:
    workers.run(1, saved_run, make_saving(hf, tmp_path), 0, 1)
    newest = tmp_path / "iter_0000001"
    found = find_checkpoint(tmp_path)
    assert found is not None and found.path == newest
    inner = found.part(CRITIC)
    assert inner is not None and inner.rollout_id == 1
    state = inner.path / "slime_state.json"
    assert json.loads(state.read_bytes())["rollout_id"] == 1
    [piece] = inner.path.glob("*.distcp")
    content = piece.read_bytes()
    piece.write_bytes(content[:-1])
    found = find_checkpoint(tmp_path)
    assert found is not None and found.rollout_id == 0, "cut short: the one before is taken"
    spoilt = bytearray(content)
    spoilt[len(content) // 2] ^= 1
    piece.write_bytes(spoilt)
    workers.run(1, saved_run, make_saving(hf, tmp_path), 1, 0)  # resumes at rollout 1 from the earlier checkpoint
    aside = newest.with_name("iter_0000001.damaged")
    assert aside.is_dir() and not newest.exists()
    aside.rename(newest)
    piece.write_bytes(content)
    state.unlink()
    found = find_checkpoint(tmp_path)
    assert found is not None and found.rollout_id == 0


def start(rank: int, world_size: int, init_method: str, args: Args) -> Arrays:
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        return critic_weights(trainer)
    finally:
        trainer.close()


def test_sources_that_a_critic_starts_from(workers: WorkerPool, untied: Path, tmp_path: Path) -> None:
    """Start from an HF directory, a policy's checkpoint and a critic's, and at another layout; no output layer."""
    grpo = make_saving(untied, tmp_path / "grpo", advantage_estimator="grpo")
    policy = workers.run(1, saved_without_critic, grpo)[0]
    _, critic, _, _ = workers.run(1, saved_run, make_saving(untied, tmp_path / "ppo"), 0, 0)[0]
    fresh = tiny.make_args(untied, **FLAGS)
    body = {name: tensor.numpy() for name, tensor in _hf_tensors(untied).items() if name != "lm_head.weight"}
    split = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1, "sequence_parallel": True}
    for args, expected in (
        (fresh, body),
        (replace(fresh, load=str(tmp_path / "grpo"), finetune=True), policy),
        (replace(fresh, critic_load=str(tmp_path / "grpo")), policy),
        (replace(fresh, load=str(tmp_path / "grpo"), critic_load=str(untied)), body),
        (replace(fresh, critic_load=str(tmp_path / "ppo")), critic),
        (replace(fresh, load=str(tmp_path / "ppo"), critic_load=str(untied)), critic),  # the run's own critic wins
    ):
        world_size, layout = (2, split) if args.critic_load and "ppo" in args.critic_load else (1, {})
        found = workers.run(world_size, start, replace(args, **layout))[0]
        assert "lm_head.weight" not in found
        for name in expected.keys() - {"lm_head.weight"}:
            assert np.array_equal(found[name], expected[name]), name
        if VALUE_HEAD not in expected:
            assert not found[VALUE_HEAD].any()
    assert critic[VALUE_HEAD].any()
    with pytest.raises(AssertionError, match=r"holds no critic.*--critic-load.*--finetune"):
        workers.run(1, start, replace(fresh, load=str(tmp_path / "grpo")))


def saved_without_critic(rank: int, world_size: int, init_method: str, args: Args) -> Arrays:
    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        assert trainer.critic is None
        trainer.train(0, BATCHES[0])
        trainer.save(0, {})
        return runs.weights(trainer)
    finally:
        trainer.close()


# --- asleep -----------------------------------------------------------------------------------------------------


def with_naps(rank: int, world_size: int, init_method: str, args: Args) -> Found:
    from slime.megatron.offload.trainer_memory import TrainerMemory

    trainer = Trainer(args, rank=rank, world_size=world_size, init_method=init_method)
    try:
        trainer.load()
        critic = trainer.critic
        assert critic is not None
        memory = TrainerMemory(critic.model, critic.optimizer)
        metrics: list[dict[str, float]] = []
        for number, batch in enumerate(BATCHES):
            assert memory.offload_optimizer() + memory.offload_weights() > 0
            held = [parameter.untyped_storage().nbytes() for chunk in critic.model for parameter in chunk.parameters()]
            assert not any(held), "nothing of it stays on the device"
            memory.reload()
            metrics.append(trainer.train(number, batch))
        return outcome(trainer, metrics)
    finally:
        trainer.close()


def test_a_critic_that_slept_continues_bit_for_bit(workers: WorkerPool, hf: Path) -> None:
    args = tiny.make_args(hf, **FLAGS, bf16=True, use_distributed_optimizer=True)
    awake = workers.run(1, train, args, BATCHES)[0]
    assert same(workers.run(1, with_naps, args)[0], awake)
