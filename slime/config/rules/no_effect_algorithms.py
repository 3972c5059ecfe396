"""The rows of the no-effect table for flags of advantages and losses.

- Used by: `no_effect`, as a part of its table.
- Invariant: there are warnings only about flags that were given.
"""

from __future__ import annotations

from slime.algo.estimators import ESTIMATOR_FACTS
from slime.config.args import SFT_ROLLOUT
from slime.config.rules.case import NoEffect

_CLIP = ("eps_clip", "eps_clip_high", "eps_clip_c")
_TIS = ("tis_clip", "tis_clip_low")
_WEIGHTS = ("offpolicy_correction", *_TIS)
_KL = ("use_kl_loss", "kl_loss_coef", "kl_coef", "kl_clamp")
_ADVANTAGE = ("advantage_estimator", "normalize_advantages", "disable_grpo_std_normalization")
_OVERLONG = ("overlong_buffer_len", "overlong_penalty_factor", "mask_truncated_samples")
_POLICY = (*_CLIP, *_KL, *_ADVANTAGE, "entropy_coef", "use_tis", *_WEIGHTS, *_OVERLONG)

ALGORITHMS: tuple[NoEffect, ...] = (
    NoEffect(
        ("kl_clamp",),
        lambda a: a.loss_type != "sft_loss" and not (a.use_kl_loss or a.log_ref_kl or a.kl_coef > 0),
        "there is no KL to the reference model",
        "add --use-kl-loss or --kl-coef",
    ),
    NoEffect(
        ("kl_loss_coef",),
        lambda a: not a.use_kl_loss and a.kl_loss_coef > 0,
        "the loss has a KL term only with --use-kl-loss",
        "add --use-kl-loss",
    ),
    NoEffect(_POLICY, lambda a: a.loss_type == "sft_loss", "--loss-type sft_loss uses no advantages, ratio or KL"),
    NoEffect(
        ("sft_loss_on",),
        lambda a: not a.supervised,
        "only SFT learns from conversations",
        f"add --loss-type sft_loss --rollout-function-path {SFT_ROLLOUT}",
    ),
    NoEffect(
        ("gamma",),
        lambda a: not ESTIMATOR_FACTS[a.advantage_estimator].discounts,
        "the estimator discounts nothing",
    ),
    NoEffect(
        ("lambd",),
        lambda a: not ESTIMATOR_FACTS[a.advantage_estimator].needs_values,
        "it belongs to GAE, which needs a critic",
    ),
    NoEffect(
        ("disable_grpo_std_normalization",),
        lambda a: a.disable_grpo_std_normalization and not ESTIMATOR_FACTS[a.advantage_estimator].divides_by_std,
        "the estimator does not divide by a group's standard deviation",
    ),
    NoEffect(
        ("normalize_advantages",),
        lambda a: (
            a.normalize_advantages
            and a.custom_advantage_function_path is None
            and ESTIMATOR_FACTS[a.advantage_estimator].whitens
        ),
        "the estimator whitens its advantages itself",
    ),
    NoEffect(
        ("kl_coef", "gamma", "lambd", "disable_grpo_std_normalization"),
        lambda a: a.custom_advantage_function_path is not None,
        "--custom-advantage-function-path computes the advantages (with --kl-coef its batch has old_log_probs "
        "and ref_log_probs)",
    ),
    NoEffect(
        ("advantage_estimator",),
        lambda a: a.loss_type == "custom_loss" and ESTIMATOR_FACTS[a.advantage_estimator].surrogate != "token",
        "with your own loss, only this estimator's advantages are used, and they equal grpo's",
        "give --advantage-estimator grpo",
    ),
    NoEffect(
        _TIS,
        lambda a: a.offpolicy_correction == "none" and not a.use_tis,
        "--offpolicy-correction none weights no token",
    ),
    NoEffect(
        _WEIGHTS,
        lambda a: a.offpolicy_correction != "none" and not a.use_tis and not a.may_be_offpolicy,
        "every token is from the current policy and needs no importance weight; it belongs to --partial-rollout, "
        "train_async.py or --use-tis",
    ),
    NoEffect(
        _WEIGHTS,
        lambda a: a.offpolicy_correction != "none" and not a.use_tis and a.mask_offpolicy_in_partial_rollout,
        "--mask-offpolicy-in-partial-rollout leaves no token to weight",
    ),
    NoEffect(
        ("kl_coef", "overlong_buffer_len"),
        lambda a: a.distills,
        "--advantage-estimator on_policy_distillation reads no reward",
    ),
)
