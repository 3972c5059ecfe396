"""Our own code alone, in float64: packing, the split, log-probs, advantages, losses and their weights, no Megatron.

A token's hidden state is its row of a table, so there are no layers. Only rounding in the sixteenth digit separates any
split of the work from the papers' formulas, computed one sample after another. So these tests notice faults that
float32 would hide: a denominator that is off by one token in ten thousand, an epsilon in the wrong place.

Shapes: _N samples, _R response tokens, _G samples of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from worker_pool import WorkerPool, joined

from slime.algo.losses import LOSSES, LossInputs
from slime.config.args import Args
from slime.config.resolve import resolve
from slime.core.architecture import Architecture
from slime.core.batch import COLUMNS, TrainBatch
from slime.core.packing import plan_steps
from slime.core.rank_batch import rank_batches
from slime.megatron.advantages import advantage_columns, counted_rows_of, loss_options, loss_weight_columns
from slime.megatron.logprobs import response_log_probs
from slime.megatron.microbatch import ContextParallel, pack_rows
from slime.megatron.parallel import Topology
from slime.megatron.share import Share

pytestmark = pytest.mark.dist

TOLERANCE = 1e-10
VOCAB, PADDED, HIDDEN = 29, 32, 8
SHAPE = Architecture(
    family="qwen3",
    num_layers=1,
    hidden_size=HIDDEN,
    ffn_hidden_size=8,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=VOCAB,
    max_position_embeddings=64,
    norm_epsilon=1e-5,
    rotary_base=1e4,
)
GROUPS_N = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2])
FAILED = 5

ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {"advantage_estimator": "grpo", "eps_clip_high": 0.3, "eps_clip_c": 1.4},
    "grpo, tokens, KL": {
        "advantage_estimator": "grpo",
        "calculate_per_token_loss": True,
        "disable_grpo_std_normalization": True,
        "use_kl_loss": True,
        "kl_loss_coef": 0.1,
        "kl_loss_type": "k3",
        "entropy_coef": 0.05,
        "kl_coef": 0.2,
    },
    "gspo": {"advantage_estimator": "gspo", "eps_clip": 0.05},
    "cispo": {"advantage_estimator": "cispo", "calculate_per_token_loss": True},
    "rloo": {"advantage_estimator": "rloo", "use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k2"},
    "rloo, weighted": {"advantage_estimator": "rloo", "use_tis": True, "tis_clip": 1.3, "tis_clip_low": 0.8},
    "rloo, masked": {
        "advantage_estimator": "rloo",
        "use_tis": True,
        "tis_clip": 1.3,
        "tis_clip_low": 0.8,
        "offpolicy_correction": "mis",
        "normalize_advantages": True,
    },
    "reinforce_plus_plus": {"advantage_estimator": "reinforce_plus_plus", "gamma": 0.9, "kl_coef": 0.1},
    "reinforce_plus_plus_baseline": {"advantage_estimator": "reinforce_plus_plus_baseline", "kl_coef": 0.1},
    "ppo": {"advantage_estimator": "ppo", "gamma": 0.95, "lambd": 0.9, "calculate_per_token_loss": True},
    "sft": {"loss_type": "sft_loss", "calculate_per_token_loss": True},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 process": (1, {"max_tokens_per_gpu": 30}),
    "TP2 with sequence parallelism": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "CP2, balanced": (2, {"context_parallel_size": 2, "max_tokens_per_gpu": 20, "balance_data": True}),
    "DP2, by samples": (2, {"use_dynamic_batch_size": False, "micro_batch_size": 2}),
    "TP2 x CP2": (4, {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "max_tokens_per_gpu": 12}),
}


@dataclass
class Found:
    loss: float
    log_probs_R: np.ndarray
    table: np.ndarray
    head: np.ndarray
    """The gradients of table and head."""


def _args(algorithm: str, layout: str = "1 process") -> Args:
    num_ranks, sizes = LAYOUTS[layout]
    flags: dict[str, Any] = {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 40, "num_rollout": 1}
    flags |= {"actor_num_gpus_per_node": num_ranks, "rollout_temperature": 0.8, "log_probs_chunk_size": 5}
    return resolve(Args(**{**flags, **sizes, **ALGORITHMS[algorithm]}))


def _weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(VOCAB, HIDDEN).requires_grad_(), draw(PADDED, HIDDEN).requires_grad_()


def _batch() -> TrainBatch:
    """Make a batch with log-probs of other policies near the trained one's, a failed reward and a masked sample."""
    chance = np.random.default_rng(0)
    prompts_N, responses_N = chance.integers(1, 5, len(GROUPS_N)), chance.integers(1, 14, len(GROUPS_N))
    row_R = np.repeat(np.arange(len(GROUPS_N)), responses_N)
    tokens = chance.integers(0, VOCAB, int((prompts_N + responses_N).sum()))
    rewards_N = chance.random(len(GROUPS_N))
    rewards_N[FAILED] = np.nan
    columns: dict[str, Any] = {
        "tokens": tokens,
        "loss_mask": (chance.random(len(row_R)) > 0.2) * (row_R != 1) * 1.0,
        "rewards": rewards_N,
        "group_indices": GROUPS_N,
        "sample_indices": np.arange(len(GROUPS_N)),
        "values": chance.random(len(row_R)),
    }
    batch = TrainBatch(prompts_N + responses_N, responses_N, columns)
    with torch.no_grad():
        own = torch.cat([chosen for chosen, _ in _rows(batch, *_weights(), 0.8)]).numpy()
    off_N = chance.uniform(-0.2, 0.2, len(GROUPS_N))
    for name in ("old_log_probs", "ref_log_probs", "rollout_log_probs"):
        columns[name] = own + off_N[row_R] + chance.uniform(-0.4, 0.4, len(row_R))
    return TrainBatch(prompts_N + responses_N, responses_N, columns)


# --- ours -------------------------------------------------------------------------------------------------------


def _cut(rank: int, world_size: int, init_method: str, algorithms: list[Args]) -> list[Found]:
    """Run each algorithm in the layout that all of them have; return sums over all ranks."""
    wide = {name: replace(column, dtype="float64") for name, column in COLUMNS.items() if column.dtype == "float32"}
    with joined(algorithms[0], rank, world_size, init_method) as topology, patch.dict(COLUMNS, wide):
        return [_one_step(args, topology, _batch()) for args in algorithms]


def _one_step(args: Args, topology: Topology, batch: TrainBatch) -> Found:
    part = ContextParallel(topology.cp_rank, topology.cp_size, topology.cp_group)
    if args.use_tis:
        batch = batch.with_column("weighted", batch.columns["loss_mask"] > 0)
    counted_N, num_responses = counted_rows_of(args, batch), len(batch.columns["old_log_probs"])
    [plan] = plan_steps(
        batch.total_lengths_N.tolist(),
        num_steps=1,
        dp_size=topology.dp_size,
        max_tokens=args.max_tokens_per_gpu * topology.cp_size if args.use_dynamic_batch_size else None,
        micro_batch_size=args.micro_batch_size,
        multiple=part.pack_multiple(topology.tp_size),
        row_multiple=part.row_multiple,
        balance=args.balance_data,
    )
    share = Share(rank_batches(batch, [plan])[topology.dp_rank], topology.dp_host_group)
    made, _ = advantage_columns(args, share, share.own.columns, counted_N)
    weights, [total] = loss_weight_columns(args, share, share.own.columns, counted_N)
    batch = replace(share.own, columns=share.own.columns | made | weights)
    assert total == 1
    table, whole_head = _weights()
    head = whole_head.detach().chunk(topology.tp_size)[topology.tp_rank].clone().requires_grad_()
    losses: list[Tensor] = []
    log_probs_R = torch.zeros(num_responses, dtype=torch.float64)
    for rows in share.batch.steps[0].micro_batches:
        micro_batch = pack_rows(batch, rows, arch=SHAPE, multiple=topology.tp_size, part=part)
        columns, hidden = micro_batch.columns, table[micro_batch.tokens_B[0]][:, None]
        if args.sequence_parallel:
            hidden = hidden.chunk(topology.tp_size)[topology.tp_rank]
        found_R, entropy_R = response_log_probs(
            hidden,
            head,
            micro_batch.predicting_R,
            micro_batch.targets_R,
            vocab_size=VOCAB,
            temperature=args.rollout_temperature,
            chunk_size=args.log_probs_chunk_size or 1,
            with_entropy=True,
            sequence_parallel=args.sequence_parallel,
            group=topology.tp_group,
        )
        inputs = LossInputs(
            log_probs_R=found_R,
            old_log_probs_R=columns["old_log_probs"],
            advantages_R=columns["advantages"],
            ref_log_probs_R=columns["ref_log_probs"],
            rollout_log_probs_R=columns["rollout_log_probs"],
            entropy_R=entropy_R,
            weighted_R=columns.get("weighted"),
            loss_mask_R=columns["loss_mask"],
            sequences=micro_batch.responses,
        )
        loss_R, _ = LOSSES[args.loss_type](inputs, loss_options(args))
        loss = (loss_R * columns["loss_weights"]).sum()
        loss.backward()
        losses.append(loss.detach())
        log_probs_R[share.places(micro_batch.responses_R)] = found_R.detach()
    loss = torch.stack(losses).sum()
    assert table.grad is not None and head.grad is not None
    for each in (loss, log_probs_R, table.grad, head.grad):
        dist.all_reduce(each, group=topology.dp_cp_group)
    if args.sequence_parallel:  # each rank's rows of the table are those of its tokens
        dist.all_reduce(table.grad, group=topology.tp_group)
    parts = [torch.empty_like(head.grad) for _ in range(topology.tp_size)]
    dist.all_gather(parts, head.grad, group=topology.tp_group)
    return Found(float(loss), log_probs_R.numpy(), table.grad.numpy(), torch.cat(parts)[:VOCAB].numpy())


# --- by hand ----------------------------------------------------------------------------------------------------


def _rows(batch: TrainBatch, table: Tensor, head: Tensor, temperature: float) -> list[tuple[Tensor, Tensor]]:
    """Return log-probs and entropies of each sample's response."""
    found: list[tuple[Tensor, Tensor]] = []
    for row, length in zip(batch.rows("tokens"), batch.response_lengths_N.tolist(), strict=True):
        tokens = torch.from_numpy(row)
        log_probs = ((table[tokens[-length - 1 : -1]] @ head[:VOCAB].t()) / temperature).log_softmax(-1)
        chosen = log_probs.gather(1, tokens[-length:, None])[:, 0]
        found.append((chosen, -(log_probs.exp() * log_probs).sum(-1)))
    return found


def _counts(args: Args, batch: TrainBatch) -> list[bool]:
    """Return which samples count: those with a reward, another one to compare it with, and an unmasked token."""
    rewards = batch.columns["rewards"]
    judged = [args.loss_type == "sft_loss" or not np.isnan(reward) for reward in rewards]
    return [ok and bool(mask.any()) for ok, mask in zip(judged, batch.rows("loss_mask"), strict=True)]


def _advantages(args: Args, batch: TrainBatch) -> list[np.ndarray]:
    """Return one number for each token of each sample, by loops over samples and tokens."""
    masks, rewards = batch.rows("loss_mask"), batch.columns["rewards"].copy()
    gaps = [old - ref for old, ref in zip(batch.rows("old_log_probs"), batch.rows("ref_log_probs"), strict=True)]
    name, judged = args.advantage_estimator, ~np.isnan(rewards)
    counts = _counts(args, batch)
    if name in ("grpo", "gspo", "cispo", "rloo"):
        rewards -= args.kl_coef * np.array([(gap * mask).sum() for gap, mask in zip(gaps, masks, strict=True)])
        found = np.zeros(len(batch))
        for row in np.flatnonzero(judged):
            others_G = rewards[judged & (GROUPS_N[row] == GROUPS_N) & (np.arange(len(batch)) != row)]
            group_G = np.append(others_G, rewards[row])
            found[row] = rewards[row] - (others_G if name == "rloo" else group_G).mean()
            if name != "rloo" and not args.disable_grpo_std_normalization:
                found[row] /= group_G.std(ddof=1) + 1e-6
        advantages = [np.full(len(mask), each) for each, mask in zip(found, masks, strict=True)]
    else:
        if name == "reinforce_plus_plus_baseline":
            rewards = np.array(
                [rewards[row] - np.nanmean(rewards[GROUPS_N[row] == GROUPS_N]) for row in range(len(batch))]
            )
        advantages = [
            _returns(args, rewards[row], gaps[row], masks[row], batch.rows("values")[row]) for row in range(len(batch))
        ]
    if name.startswith("reinforce") or args.normalize_advantages:
        kept = np.concatenate(
            [each[mask > 0] for each, mask, count in zip(advantages, masks, counts, strict=True) if count]
        )
        advantages = [(each - kept.mean()) / (kept.std() + 1e-8) for each in advantages]
    return advantages


def _returns(args: Args, reward: float, gap: np.ndarray, mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the discounted returns of the counted tokens; for ppo the sums of GAE."""
    places = np.flatnonzero(mask)
    found = np.zeros(len(mask))
    later, next_value = 0.0, 0.0
    for place in reversed(places):
        earned = -args.kl_coef * gap[place] + (reward if place == places[-1] else 0.0)
        if args.advantage_estimator == "ppo":
            later = earned + args.gamma * next_value - values[place] + args.gamma * args.lambd * later
        else:
            later = earned + args.gamma * later
        found[place], next_value = later, values[place]
    return found


def _surrogate(args: Args, chosen: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    low, high = 1 - args.eps_clip, 1 + (args.eps_clip_high or args.eps_clip)
    ratio = (chosen - old).exp()
    if args.advantage_estimator == "cispo":
        return -ratio.detach().clamp(low, high) * advantages * chosen
    if args.advantage_estimator == "gspo":  # arXiv:2507.18071, equation 7: the whole gradient of the whole response
        ratio = (((chosen - old) * mask).sum() / mask.sum()).exp().expand(len(chosen))
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
    if args.eps_clip_c is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * args.eps_clip_c), loss)
    return loss


def _by_hand(args: Args) -> Found:
    batch = _batch()
    table, head = _weights()
    advantages, counts, masks = _advantages(args, batch), _counts(args, batch), batch.rows("loss_mask")
    losses: list[Tensor] = []
    tokens = sum(float(mask.sum()) for mask, count in zip(masks, counts, strict=True) if count)
    rows = _rows(batch, table, head, args.rollout_temperature)
    for row, (chosen, entropy) in enumerate(rows):
        if not counts[row]:
            continue
        old, ref, behaviour, mask = (
            torch.from_numpy(batch.rows(name)[row])
            for name in ("old_log_probs", "ref_log_probs", "rollout_log_probs", "loss_mask")
        )
        if args.loss_type == "sft_loss":
            loss = -chosen
        else:
            loss = _surrogate(args, chosen, old, torch.from_numpy(advantages[row]), mask)
            if args.use_tis:
                weight = (old - behaviour).exp()
                inside = (weight >= args.tis_clip_low) & (weight <= args.tis_clip)
                clamped = weight.clamp(args.tis_clip_low, args.tis_clip)
                loss = loss * (torch.where(inside, weight, 0.0) if args.offpolicy_correction == "mis" else clamped)
            if args.use_kl_loss:
                gap = ref - chosen
                loss = loss + args.kl_loss_coef * (gap.exp() - gap - 1 if args.kl_loss_type == "k3" else gap**2 / 2)
            loss = loss - args.entropy_coef * entropy
        divisor = tokens if args.calculate_per_token_loss else mask.sum() * sum(counts)
        losses.append((loss * mask).sum() / divisor)
    total = torch.stack(losses).sum()
    total.backward()
    assert table.grad is not None and head.grad is not None
    log_probs = torch.cat([chosen.detach() for chosen, _ in rows])
    return Found(total.item(), log_probs.numpy(), table.grad.numpy(), head.grad[:VOCAB].numpy())


def _difference(found: Found, expected: Found) -> float:
    parts = [abs(found.loss - expected.loss) / max(abs(expected.loss), 0.1)]
    for name in ("log_probs_R", "table", "head"):
        here, there = vars(found)[name], vars(expected)[name]
        parts.append(float(np.linalg.norm(here - there) / np.linalg.norm(there)))
    return max(parts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_algorithm_in_float64(layout: str, workers: WorkerPool) -> None:
    ranks = workers.run(LAYOUTS[layout][0], _cut, [_args(algorithm, layout) for algorithm in ALGORITHMS])
    for algorithm, *found in zip(ALGORITHMS, *ranks, strict=True):
        expected = _by_hand(_args(algorithm))
        assert max(_difference(each, expected) for each in found) <= TOLERANCE, (
            algorithm,
            found[0].loss,
            expected.loss,
        )


def test_controls() -> None:
    """Notice the difference between any two algorithms, and one token more in a denominator."""
    found = {algorithm: _by_hand(_args(algorithm)) for algorithm in ALGORITHMS}
    for one in found:
        for other in found:
            assert one == other or _difference(found[one], found[other]) > 1e-3, (one, other)
    args = _args("grpo")
    assert _difference(_by_hand(replace(args, eps_clip_c=1.4 + 1e-6)), found["grpo"]) > TOLERANCE
    assert _difference(_by_hand(replace(args, rollout_temperature=0.8 + 1e-9)), found["grpo"]) > TOLERANCE
