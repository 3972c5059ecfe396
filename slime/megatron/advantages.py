"""The batch columns that flags define: a rollout's advantages and loss weights, and the loss that reads them.

- Used by: `trainer`, after the log-probs and before the steps; `slime.algo` has the math.
- Invariant: both columns are functions of the whole rollout, computed equally on every rank, before the batch is cut.

Shapes: _N samples, _R response tokens of all samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from slime.algo.advantages import ESTIMATORS, AdvantageOptions, RolloutRewards, counted_rows
from slime.algo.estimators import ESTIMATOR_FACTS
from slime.algo.losses import LOSSES, Loss, LossOptions
from slime.algo.overlong import overlong_penalties
from slime.algo.reducers import loss_weights, whiten
from slime.config.args import Args
from slime.core.batch import Array, TrainBatch
from slime.core.plugins import load_hook


def loss_of(args: Args) -> Loss:
    """Return the loss function of --loss-type, which may be the user's own."""
    if args.loss_type != "custom_loss":
        return LOSSES[args.loss_type]
    if args.custom_loss_function_path is None:
        raise ValueError("--loss-type custom_loss: --custom-loss-function-path is not given; name your loss")
    return load_hook("custom_loss_function_path", args.custom_loss_function_path)


def loss_options(args: Args) -> LossOptions:
    """Return the options of the loss, as the flags define them."""
    return LossOptions(
        surrogate=ESTIMATOR_FACTS[args.advantage_estimator].surrogate,
        eps_clip=args.eps_clip,
        eps_clip_high=args.eps_clip if args.eps_clip_high is None else args.eps_clip_high,
        eps_clip_c=args.eps_clip_c,
        kl_loss_coef=args.kl_loss_coef if args.use_kl_loss else 0.0,
        kl_loss_type=args.kl_loss_type,
        kl_clamp=args.kl_loss_clamp,
        entropy_coef=args.entropy_coef,
        offpolicy_correction=args.offpolicy_correction,
        tis_clip=args.tis_clip,
        tis_clip_low=args.tis_clip_low,
    )


def counted_rows_of(args: Args, batch: TrainBatch) -> Array:
    """Return [N] bool, the samples that the loss counts: all for SFT, otherwise those that have a reward.

    If the estimator compares the samples of a group, a group with fewer than two rewards is left out, too.
    """
    rewards_N = batch.columns["rewards"]
    if args.loss_type == "sft_loss":
        return np.ones(len(batch), dtype=np.bool_)
    groups_N = torch.from_numpy(batch.columns["group_indices"])
    return counted_rows(torch.from_numpy(rewards_N), groups_N, compares_group=args.compares_group).numpy()


def _shape_rewards(args: Args, batch: TrainBatch, counted_N: Array) -> tuple[TrainBatch, dict[str, float]]:
    """Add the penalty of --overlong-buffer-len to the rewards; return the batch (unchanged without it) and metrics."""
    if args.overlong_buffer_len is None or args.loss_type == "sft_loss" or args.distills:
        return batch, {}
    penalties_N = overlong_penalties(
        torch.from_numpy(batch.response_lengths_N),
        max_length=args.rollout_max_response_len,
        buffer=args.overlong_buffer_len,
        factor=args.overlong_penalty_factor,
    ).numpy()
    counted = penalties_N[counted_N]
    metrics: dict[str, float] = {}
    if len(counted):
        metrics = {"train/overlong_penalty": counted.mean(), "train/overlong_samples": (counted < 0).mean()}
    return batch.with_column("rewards", batch.columns["rewards"] + penalties_N), metrics


def _distillation_metrics(args: Args, batch: TrainBatch, counted_N: Array) -> dict[str, float]:
    """Return the distance of the student from its teacher before the rollout's first step; {} without a teacher."""
    mask_R = (batch.columns["loss_mask"] > 0) & np.repeat(counted_N, batch.response_lengths_N)
    if not args.distills or not mask_R.any():
        return {}
    kl_R = batch.columns["old_log_probs"].astype(np.float64) - batch.columns["ref_log_probs"]
    return {"train/teacher_kl": float(kl_R[mask_R].mean())}


def add_advantages(args: Args, batch: TrainBatch, counted_N: Array) -> tuple[TrainBatch, dict[str, float]]:
    """Add the `advantages` column, by the estimator or the user's hook; with `values`, also add `returns`.

    --overlong-buffer-len changes rewards first. The metrics cover that penalty and the distance from a teacher.

    Raises:
        ValueError: the result of a hook has another length.
    """
    num_responses = int(batch.response_lengths_N.sum())
    if args.loss_type == "sft_loss":
        return batch.with_column("advantages", np.zeros(num_responses)), {}
    batch, metrics = _shape_rewards(args, batch, counted_N)
    if args.custom_advantage_function_path is not None:
        advantages_R = _by_hook(args, args.custom_advantage_function_path, batch)
    else:
        options = AdvantageOptions(
            normalize_std=not args.disable_grpo_std_normalization,
            kl_coef=args.kl_coef,
            kl_clamp=args.kl_reward_clamp,
            gamma=args.gamma,
            lambd=args.lambd,
        )
        advantages_R = ESTIMATORS[args.advantage_estimator](_rewards_of(args, batch, counted_N), options).numpy()
        if batch.has("values"):
            batch = batch.with_column("returns", advantages_R + batch.columns["values"])
    if args.normalize_advantages:
        mask_R = batch.columns["loss_mask"] * np.repeat(counted_N, batch.response_lengths_N)
        whitened_R = whiten(torch.from_numpy(advantages_R), torch.from_numpy(mask_R))
        advantages_R = whitened_R.numpy()
    return batch.with_column("advantages", advantages_R), metrics | _distillation_metrics(args, batch, counted_N)


def _by_hook(args: Args, path: str, batch: TrainBatch) -> Array:
    advantages_R = np.asarray(load_hook("custom_advantage_function_path", path)(args, batch))
    num_responses = int(batch.response_lengths_N.sum())
    if advantages_R.shape != (num_responses,):
        raise ValueError(
            f"--custom-advantage-function-path {path} returned shape {advantages_R.shape}; it has to return one "
            f"advantage a response token, ({num_responses},)"
        )
    return advantages_R


def _rewards_of(args: Args, batch: TrainBatch, counted_N: Array) -> RolloutRewards:
    """Collect an estimator's inputs; the two policies' log-probs exist if --kl-coef or a teacher needs them."""
    kl_R = None
    if args.needs_kl_first:
        kl_R = torch.from_numpy(batch.columns["old_log_probs"] - batch.columns["ref_log_probs"])
    return RolloutRewards(
        rewards_N=torch.from_numpy(batch.columns["rewards"]),
        group_indices_N=torch.from_numpy(batch.columns["group_indices"]),
        counted_N=torch.from_numpy(counted_N),
        response_lengths_N=torch.from_numpy(batch.response_lengths_N),
        loss_mask_R=torch.from_numpy(batch.columns["loss_mask"]),
        kl_R=kl_R,
        values_R=torch.from_numpy(batch.columns["values"]) if batch.has("values") else None,
    )


def add_loss_weights(
    args: Args, batch: TrainBatch, counted_N: Array, steps: Sequence[Sequence[int]]
) -> tuple[TrainBatch, list[float]]:
    """Add the `loss_weights` column; return it with its sum in each step: 1, or 0 if nothing counts.

    `steps` lists the rows of each optimizer step; the weights sum to 1 over each.
    """
    weights_N: list[Array] = [np.empty(0)] * len(batch)
    masks_N = batch.rows("loss_mask")
    sums: list[float] = []
    for rows in steps:
        lengths = batch.response_lengths_N[list(rows)]
        weights = loss_weights(
            torch.from_numpy(np.concatenate([masks_N[row] for row in rows])),
            torch.from_numpy(lengths),
            torch.from_numpy(counted_N[list(rows)]),
            per_token=args.calculate_per_token_loss,
        ).numpy()
        sums.append(float(round(weights.sum())))
        for row, row_weights in zip(rows, np.split(weights, np.cumsum(lengths)[:-1]), strict=True):
            weights_N[row] = row_weights
    return batch.with_column("loss_weights", np.concatenate(weights_N)), sums
