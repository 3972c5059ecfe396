"""Off-policy tokens: which tokens of a rollout older weights made, and which of them get an importance weight.

- Used by: `trainer`, before it plans its steps; `step` passes the `weighted` column to the loss.
- Invariant: a token that does not count in the loss is not weighted, and every rank has the same columns. A token of
  a sample without a reward does not count, but it is off-policy if older weights made it: with the trainer's weights
  its log-prob is another one, which is no sign of an engine that disagrees.

Weights are identified by the policy version under which the engines know them. In every run, the trainer's weights
before the first step of rollout r are version r + 1, because they are sent once before the first rollout and once after
each. In the asynchronous loop, a token of version r in rollout r is one version old.

Shapes: _N samples, _R response tokens of the rank's own samples.
"""

from __future__ import annotations

import numpy as np

from slime.config.args import Args
from slime.core.batch import TrainBatch
from slime.core.columns import Array, with_declared_dtypes
from slime.megatron.share import Share


def version_of_weights(args: Args, rollout_id: int, share: Share, policy_version: int | None) -> int:
    """Return the version of the trainer's weights: `policy_version` if they were sent to engines. Collective.

    If they were not (a replay without engines), it is the version that any run has at this rollout, so a replay
    corrects what the run that made the dump corrected. A dump may come from a later rollout or from another run: if its
    newest token is newer than that version, that token counts as current.

    Raises:
        ValueError: a token that was not replayed is newer than the weights that are trained: versions are confused.
        RuntimeError: a token is older, although neither the flags nor a rollout function of the user makes such tokens.
    """
    version = rollout_id + 1 if policy_version is None else policy_version
    if not share.own.has("policy_versions"):
        return version
    versions_R, counts_R = share.own.columns["policy_versions"], share.own.columns["loss_mask"] > 0
    highest, lowest = share.largest(
        np.max(versions_R, where=counts_R, initial=version), -np.min(versions_R, where=counts_R, initial=version)
    )
    newest, oldest = int(highest), -int(lowest)
    if policy_version is None or args.load_debug_rollout_data is not None:
        return newest
    own = not args.has_usual_rollout
    if oldest < version and not (args.partial_rollout or args.rollouts_ahead or own):
        raise RuntimeError(
            f"rollout {rollout_id}: a token was made by policy version {oldest}, and the trainer's weights are version "
            f"{version}, in a synchronous run: an engine has missed a weight sync, and the run would train on tokens "
            "of older weights; the engines' logs may show the reason"
        )
    if newest > version:
        raise ValueError(
            f"rollout {rollout_id}: a token was made by policy version {newest}, and the trainer's weights are version "
            f"{version}: off-policy tokens cannot be identified; a rollout or generate function of your own has to "
            "keep the policy_versions that the engines return"
        )
    return newest


def offpolicy_columns(
    args: Args, share: Share, counted_N: Array, version: int
) -> tuple[dict[str, Array], dict[str, float]]:
    """Return `offpolicy` and `weighted` if any token needs them, `loss_mask` if flags mask tokens, and metrics.

    Collective. A column exists on all ranks or on none, also if the only tokens that need it are those of one rank.

    Raises:
        ValueError: tokens have to be weighted or masked, and a column that this needs is missing.
    """
    if args.loss_type == "sft_loss":  # SFT's tokens were not sampled
        return {}, {}
    batch = share.own
    sampled_R = batch.columns["loss_mask"] > 0
    counts_R = sampled_R & np.repeat(counted_N[share.rows_M], batch.response_lengths_N)
    columns: dict[str, Array] = {}
    metrics: dict[str, float] = {}
    offpolicy_R, num_offpolicy = np.zeros_like(counts_R), 0.0
    if batch.has("policy_versions"):
        age_R = version - batch.columns["policy_versions"].astype(np.int64)
        offpolicy_R = sampled_R & (age_R > 0)
        ages = age_R[counts_R]
        num_offpolicy, num_counted, num_older, age = share.totals(
            offpolicy_R.sum(), counts_R.sum(), (counts_R & offpolicy_R).sum(), ages.sum()
        )
        [oldest] = share.largest(ages.max(initial=np.iinfo(np.int64).min))
        if num_counted:
            metrics["train/offpolicy_tokens"] = num_older / num_counted
            metrics["train/staleness"] = age / num_counted
            metrics["train/staleness_max"] = oldest
    else:
        _check_versions_are_not_needed(args)
    if args.mask_offpolicy_in_partial_rollout and num_offpolicy:
        columns["loss_mask"] = np.where(offpolicy_R, 0.0, batch.columns["loss_mask"])
        counts_R, offpolicy_R, num_offpolicy = counts_R & ~offpolicy_R, np.zeros_like(offpolicy_R), 0.0
    if num_offpolicy:
        columns["offpolicy"] = offpolicy_R
    weighted_R = counts_R if args.use_tis else counts_R & offpolicy_R
    if args.offpolicy_correction != "none" and share.totals(weighted_R.sum())[0]:
        _check_log_probs(args, batch)
        columns["weighted"] = weighted_R
    return with_declared_dtypes(columns), metrics


def _check_versions_are_not_needed(args: Args) -> None:
    """Refuse samples without versions if flags need them: every token would count as sampled by current weights."""
    wanted = args.mask_offpolicy_in_partial_rollout or args.offpolicy_correction != "none"
    if args.loss_type == "policy_loss" and wanted and (args.partial_rollout or args.rollouts_ahead):
        why = "--partial-rollout" if args.partial_rollout else "train_async.py"
        raise ValueError(
            f"{why} trains on tokens of older weights, and the samples do not show which: no sample has "
            "policy_versions; a generate function of your own has to set them (slime.rollout.generate does), or give "
            "--offpolicy-correction none"
        )


def _check_log_probs(args: Args, batch: TrainBatch) -> None:
    if args.loss_type == "policy_loss" and not batch.has("rollout_log_probs"):
        why = "--use-tis" if args.use_tis else f"--offpolicy-correction {args.offpolicy_correction}"
        raise ValueError(
            f"{why}: importance weights need the log-probs with which tokens were sampled, and the samples "
            "have no rollout_log_probs; a generate function of your own has to set them (slime.rollout.generate does), "
            "or give --offpolicy-correction none, without --use-tis"
        )
