"""The batch columns that flags define: a rollout's advantages and loss weights, and the loss that reads them.

- Used by: `trainer`, after the log-probs and before the steps; `slime.algo` has the math.
- Invariant: both columns are functions of the whole rollout. Each rank computes those of its own rows, from these rows
  and from numbers that every row of the rollout has one of; the bits do not depend on which rank has which rows.

Shapes: _N samples of the rollout, _R response tokens of the rank's own samples.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from slime.algo.advantages import ESTIMATORS, AdvantageOptions, RolloutRewards, counted_rows
from slime.algo.estimators import ESTIMATOR_FACTS
from slime.algo.losses import LOSSES, Loss, LossOptions
from slime.algo.overlong import overlong_penalties
from slime.algo.reducers import counted_tokens, loss_weights, whiten
from slime.config.args import Args
from slime.core.batch import RowColumns, TrainBatch
from slime.core.columns import Array, with_declared_dtypes
from slime.core.plugins import hook_function
from slime.megatron.share import Share

Columns = Mapping[str, Array]


def loss_of(args: Args) -> Loss:
    """Return the loss function of --loss-type, which may be the user's own."""
    if args.loss_type != "custom_loss":
        return LOSSES[args.loss_type]
    if args.custom_loss_function_path is None:
        raise ValueError("--loss-type custom_loss: --custom-loss-function-path is not given; name your loss")
    return hook_function("custom_loss_function_path", args.custom_loss_function_path)


def loss_options(args: Args) -> LossOptions:
    """Return the options of the loss, as the flags define them."""
    return LossOptions(
        surrogate=ESTIMATOR_FACTS[args.advantage_estimator].surrogate,
        eps_clip=args.eps_clip,
        eps_clip_high=args.resolved.eps_clip_high,
        eps_clip_c=args.eps_clip_c,
        kl_loss_coef=args.kl_loss_coef if args.use_kl_loss else 0.0,
        kl_loss_type=args.kl_loss_type,
        kl_clamp=args.kl_loss_clamp,
        entropy_coef=args.entropy_coef,
        offpolicy_correction=args.offpolicy_correction,
        tis_clip=args.tis_clip,
        tis_clip_low=args.tis_clip_low,
    )


def counted_rows_of(args: Args, rows: RowColumns) -> Array:
    """Return [N] bool, the samples that the loss counts: all for SFT, otherwise those that have a reward.

    If the estimator compares the samples of a group, a group with fewer than two rewards is left out, too.
    """
    rewards_N = rows.columns["rewards"]
    if args.loss_type == "sft_loss":
        return np.ones(len(rows), dtype=np.bool_)
    groups_N = torch.from_numpy(rows.columns["group_indices"])
    return counted_rows(torch.from_numpy(rewards_N), groups_N, compares_group=args.compares_group).numpy()


def _shaped_rewards(args: Args, rows: RowColumns, counted_N: Array) -> tuple[Array, dict[str, float]]:
    """Return all `rewards`, with the penalty of --overlong-buffer-len if the flag is given, and its metrics."""
    rewards_N = rows.columns["rewards"]
    if args.overlong_buffer_len is None or args.distills:
        return rewards_N, {}
    penalties_N = overlong_penalties(
        torch.from_numpy(rows.response_lengths_N),
        max_length=args.rollout_max_response_len,
        buffer=args.overlong_buffer_len,
        factor=args.overlong_penalty_factor,
    ).numpy()
    counted = penalties_N[counted_N]
    metrics: dict[str, float] = {}
    if len(counted):
        metrics = {"train/overlong_penalty": counted.mean(), "train/overlong_samples": (counted < 0).mean()}
    return with_declared_dtypes({"rewards": rewards_N + penalties_N})["rewards"], metrics


def _distillation_metrics(args: Args, columns: Columns, rollout: RolloutRewards) -> dict[str, float]:
    """Return the distance of the student from its teacher before the rollout's first step; {} without a teacher."""
    if not args.distills:
        return {}
    counts_R = rollout.mask_R & (rollout.loss_mask_R > 0)
    kl_R = torch.from_numpy(columns["old_log_probs"].astype(np.float64) - columns["ref_log_probs"])
    total, count = rollout.total(torch.where(counts_R, kl_R, 0.0)), rollout.total(counts_R)
    return {"train/teacher_kl": total / count} if count else {}


def advantage_columns(
    args: Args, share: Share, columns: Columns, counted_N: Array
) -> tuple[dict[str, Array], dict[str, float]]:
    """Return `advantages`, by the estimator or the user's hook, and metrics; with `values`, also `returns`. Collective.

    --overlong-buffer-len changes rewards first, and `rewards` is then returned, too. The metrics cover that penalty and
    the distance from a teacher.

    Args:
        columns: all columns of the own rows so far, the received ones and the ones that training has computed.

    Raises:
        ValueError: the result of a hook has another length.
    """
    if args.loss_type == "sft_loss":
        return with_declared_dtypes({"advantages": np.zeros(int(share.own.response_lengths_N.sum()))}), {}
    rewards_N, metrics = _shaped_rewards(args, share.rows, counted_N)
    made: dict[str, Array] = {}
    if rewards_N is not share.rows.columns["rewards"]:
        made["rewards"] = rewards_N[share.rows_M]
    rollout = _rewards_of(args, share, columns, rewards_N, counted_N)
    if args.custom_advantage_function_path is not None:
        whole = share.whole({**columns, **made})
        advantages_R = share.own_part(advantages_by_hook(args, args.custom_advantage_function_path, whole))
    else:
        options = AdvantageOptions(
            normalize_std=not args.disable_grpo_std_normalization,
            kl_coef=args.kl_coef,
            kl_clamp=args.kl_reward_clamp,
            gamma=args.gamma,
            lambd=args.lambd,
        )
        advantages_R = ESTIMATORS[args.advantage_estimator](rollout, options).numpy()
        if "values" in columns:
            made["returns"] = advantages_R + columns["values"]
    if args.normalize_advantages:
        mask_R = rollout.loss_mask_R * rollout.counted_N[rollout.row_R]
        advantages_R = whiten(torch.from_numpy(advantages_R), mask_R, rollout.total).numpy()
    made["advantages"] = advantages_R
    return with_declared_dtypes(made), metrics | _distillation_metrics(args, columns, rollout)


def advantages_by_hook(args: Args, path: str, batch: TrainBatch) -> Array:
    """Return the advantages of --custom-advantage-function-path.

    Raises:
        ValueError: it returned another number of them than there are response tokens.
    """
    advantages_R = np.asarray(hook_function("custom_advantage_function_path", path)(args, batch))
    num_responses = int(batch.response_lengths_N.sum())
    if advantages_R.shape != (num_responses,):
        raise ValueError(
            f"--custom-advantage-function-path {path} returned shape {advantages_R.shape}; it has to return one "
            f"advantage a response token, ({num_responses},)"
        )
    return advantages_R


def _rewards_of(args: Args, share: Share, columns: Columns, rewards_N: Array, counted_N: Array) -> RolloutRewards:
    """Collect an estimator's inputs; the two policies' log-probs exist if --kl-coef or a teacher needs them."""
    kl_R = None
    if args.needs_kl_first:
        kl_R = torch.from_numpy(columns["old_log_probs"] - columns["ref_log_probs"])
    return RolloutRewards(
        rewards_N=torch.from_numpy(rewards_N),
        group_indices_N=torch.from_numpy(share.rows.columns["group_indices"]),
        counted_N=torch.from_numpy(counted_N),
        response_lengths_N=torch.from_numpy(share.rows.response_lengths_N),
        loss_mask_R=torch.from_numpy(columns["loss_mask"]),
        kl_R=kl_R,
        values_R=torch.from_numpy(columns["values"]) if "values" in columns else None,
        rows_M=torch.from_numpy(share.rows_M),
        all_rows=share.all_rows,
    )


def loss_weight_columns(
    args: Args, share: Share, columns: Columns, counted_N: Array
) -> tuple[dict[str, Array], list[float]]:
    """Return `loss_weights`, and its sum in each step: 1, or 0 if nothing counts. Collective.

    The weights of all ranks sum to that over each step.
    """
    lengths_M, counted_M = share.own.response_lengths_N, torch.from_numpy(counted_N[share.rows_M])
    mask_R = torch.from_numpy(columns["loss_mask"])
    tokens_N = share.all_rows(counted_tokens(mask_R, torch.from_numpy(lengths_M), counted_M))
    weights_R = np.zeros(len(mask_R))
    sums: list[float] = []
    step_N = share.batch.step_N
    for number in range(len(share.batch.steps)):
        in_step_M = step_N[share.rows_M] == number
        # a single step has all tokens, and needs no copy of them
        in_step_R = slice(None) if in_step_M.all() else np.repeat(in_step_M, lengths_M)
        step_tokens = tokens_N[torch.from_numpy(step_N == number)]
        weights_R[in_step_R] = loss_weights(
            mask_R[in_step_R],
            torch.from_numpy(lengths_M[in_step_M]),
            counted_M[torch.from_numpy(in_step_M)],
            per_token=args.calculate_per_token_loss,
            step_tokens_N=step_tokens,
        ).numpy()
        sums.append(float(round(float(step_tokens.sum().sign()))))
    return with_declared_dtypes({"loss_weights": weights_R}), sums
