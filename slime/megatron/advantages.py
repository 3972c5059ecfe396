"""The batch columns that flags define: a rollout's advantages and loss weights, and the loss that reads them.

- Used by: `trainer`, after the log-probs and before the steps; `slime.algo` has the math.
- Invariant: both columns are functions of the whole rollout, computed equally on every rank, before the batch is cut.

Shapes: _N samples, _R response tokens of all samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from slime.algo.advantages import ESTIMATORS, AdvantageOptions, RolloutRewards, counted_rows
from slime.algo.estimators import ESTIMATOR_FACTS
from slime.algo.losses import LOSSES, Loss, LossOptions
from slime.algo.overlong import overlong_penalties
from slime.algo.reducers import loss_weights, whiten
from slime.config.args import Args
from slime.core.batch import TrainBatch
from slime.core.columns import Array, with_declared_dtypes
from slime.core.plugins import hook_function

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


def counted_rows_of(args: Args, batch: TrainBatch) -> Array:
    """Return [N] bool, the samples that the loss counts: all for SFT, otherwise those that have a reward.

    If the estimator compares the samples of a group, a group with fewer than two rewards is left out, too.
    """
    rewards_N = batch.columns["rewards"]
    if args.loss_type == "sft_loss":
        return np.ones(len(batch), dtype=np.bool_)
    groups_N = torch.from_numpy(batch.columns["group_indices"])
    return counted_rows(torch.from_numpy(rewards_N), groups_N, compares_group=args.compares_group).numpy()


def _shape_rewards(args: Args, batch: TrainBatch, counted_N: Array) -> tuple[dict[str, Array], dict[str, float]]:
    """Return `rewards` with the penalty of --overlong-buffer-len, and its metrics; nothing without the flag."""
    if args.overlong_buffer_len is None or args.distills:
        return {}, {}
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
    return with_declared_dtypes({"rewards": batch.columns["rewards"] + penalties_N}), metrics


def _distillation_metrics(args: Args, columns: Columns, counted_R: Array) -> dict[str, float]:
    """Return the distance of the student from its teacher before the rollout's first step; {} without a teacher."""
    mask_R = (columns["loss_mask"] > 0) & counted_R
    if not args.distills or not mask_R.any():
        return {}
    kl_R = columns["old_log_probs"].astype(np.float64) - columns["ref_log_probs"]
    return {"train/teacher_kl": float(kl_R[mask_R].mean())}


def advantage_columns(
    args: Args, batch: TrainBatch, columns: Columns, counted_N: Array
) -> tuple[dict[str, Array], dict[str, float]]:
    """Return `advantages`, by the estimator or the user's hook, and metrics; with `values`, also `returns`.

    --overlong-buffer-len changes rewards first, and `rewards` is then returned, too. The metrics cover that penalty and
    the distance from a teacher.

    Args:
        batch: the rollout as it came, for its lengths and rewards.
        columns: all columns so far, the batch's own and those that training has made of it.

    Raises:
        ValueError: the result of a hook has another length.
    """
    if args.loss_type == "sft_loss":
        return with_declared_dtypes({"advantages": np.zeros(int(batch.response_lengths_N.sum()))}), {}
    made, metrics = _shape_rewards(args, batch, counted_N)
    columns = {**columns, **made}
    counted_R = np.repeat(counted_N, batch.response_lengths_N)
    if args.custom_advantage_function_path is not None:
        read = TrainBatch(batch.total_lengths_N, batch.response_lengths_N, columns)
        advantages_R = advantages_by_hook(args, args.custom_advantage_function_path, read)
    else:
        options = AdvantageOptions(
            normalize_std=not args.disable_grpo_std_normalization,
            kl_coef=args.kl_coef,
            kl_clamp=args.kl_reward_clamp,
            gamma=args.gamma,
            lambd=args.lambd,
        )
        rewards = _rewards_of(args, columns, batch.response_lengths_N, counted_N)
        advantages_R = ESTIMATORS[args.advantage_estimator](rewards, options).numpy()
        if "values" in columns:
            made["returns"] = advantages_R + columns["values"]
    if args.normalize_advantages:
        mask_R = columns["loss_mask"] * counted_R
        advantages_R = whiten(torch.from_numpy(advantages_R), torch.from_numpy(mask_R)).numpy()
    made["advantages"] = advantages_R
    return with_declared_dtypes(made), metrics | _distillation_metrics(args, columns, counted_R)


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


def _rewards_of(args: Args, columns: Columns, response_lengths_N: Array, counted_N: Array) -> RolloutRewards:
    """Collect an estimator's inputs; the two policies' log-probs exist if --kl-coef or a teacher needs them."""
    kl_R = None
    if args.needs_kl_first:
        kl_R = torch.from_numpy(columns["old_log_probs"] - columns["ref_log_probs"])
    return RolloutRewards(
        rewards_N=torch.from_numpy(columns["rewards"]),
        group_indices_N=torch.from_numpy(columns["group_indices"]),
        counted_N=torch.from_numpy(counted_N),
        response_lengths_N=torch.from_numpy(response_lengths_N),
        loss_mask_R=torch.from_numpy(columns["loss_mask"]),
        kl_R=kl_R,
        values_R=torch.from_numpy(columns["values"]) if "values" in columns else None,
    )


def loss_weight_columns(
    args: Args, batch: TrainBatch, columns: Columns, counted_N: Array, steps: Sequence[Sequence[int]]
) -> tuple[dict[str, Array], list[float]]:
    """Return `loss_weights`, and its sum in each step: 1, or 0 if nothing counts.

    `steps` lists the rows of each optimizer step; the weights sum to 1 over each.
    """
    weights_N: list[Array] = [np.empty(0)] * len(batch)
    masks_N = np.split(columns["loss_mask"], np.cumsum(batch.response_lengths_N)[:-1])
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
    return with_declared_dtypes({"loss_weights": np.concatenate(weights_N)}), sums
