"""Rules for tokens of older policies: partial rollouts and train_async.py, which make them, and importance weights.

- Used by: `rules.check`.
- Invariant: in a run that passes, every token is recorded with the one policy version that generated it, only one
  treatment of older tokens is chosen, and tokens are left to train on. With --deterministic a token count decides which
  groups are left unfinished, never the clock.
"""

from __future__ import annotations

from collections.abc import Iterable

from slime.config.problem import Problem
from slime.config.rules.case import Case


def partial_rollout(case: Case) -> Iterable[Problem]:
    """Check the flags for partial rollouts, and warn about those without effect."""
    args = case.args
    most = args.partial_rollout_max_tokens
    if not args.partial_rollout:
        if args.mask_offpolicy_in_partial_rollout and not args.rollouts_ahead:
            why = "it belongs to --partial-rollout"
            yield _vain(case, "mask_offpolicy_in_partial_rollout", why, "add --partial-rollout")
    elif not args.has_usual_rollout:
        why = "--rollout-function-path replaces the function that leaves responses unfinished"
        yield _vain(case, "partial_rollout", why, "leave it out, unless your function reads args.partial_rollout")
    elif args.deterministic and most is None:
        rule = "with --deterministic: the length of a response when it is aborted depends on the clock"
        remedy = "add --partial-rollout-max-tokens, after which a response is set aside"
        about = ("deterministic", "partial_rollout_max_tokens")
        yield case.error("partial_rollout", rule, remedy, also=about)
    elif most is not None and most >= args.rollout_max_response_len:
        why = f"--rollout-max-response-len {args.rollout_max_response_len} ends a response earlier"
        yield _vain(case, "partial_rollout_max_tokens", why, "lower it")
    elif most is None and not _leaves_unfinished(case):
        why = "no additional prompts are sampled, so no group is left unfinished"
        yield _vain(case, "partial_rollout", why, "raise --over-sampling-batch-size")
    if args.max_staleness is not None and not args.partial_rollout and not args.rollouts_ahead:
        why = "every token is from the current policy; it belongs to --partial-rollout and train_async.py"
        yield _vain(case, "max_staleness", why, "leave it out")


def _leaves_unfinished(case: Case) -> bool:
    args = case.args
    return args.over_sampling_batch_size != args.rollout_batch_size or args.dynamic_sampling_filter_path is not None


def _vain(case: Case, field: str, why: str, remedy: str) -> Problem:
    return case.warning(field, f"no effect: {why}", remedy)


def ahead(case: Case) -> Iterable[Problem]:
    """Check the flags that work differently, or not at all, with train_async.py."""
    args = case.args
    if not args.rollouts_ahead:
        return
    if args.colocate:
        rule = "train_async.py generates while it trains, so engines and trainers need devices of their own"
        yield case.error("colocate", rule, "leave it out and give --rollout-num-gpus, or start train.py")
    if args.max_staleness is not None and args.max_staleness < args.rollouts_ahead:
        rule = "train_async.py trains on tokens of the previous policy, so every token is at least 1 version old"
        yield case.error("max_staleness", rule, "make it at least 1, or start train.py")
    if not args.num_engines or args.debug_rollout_only:
        return  # no weights are sent
    if args.update_weight_pause in ("in_place", "retract"):
        rule = "train_async.py has requests in flight, and their responses would report only the later of two policies"
        yield case.error("update_weight_pause", rule, "use drain or abort")
    elif args.deterministic and args.update_weight_pause == "abort":
        rule = "with --deterministic: the last token of the old weights would depend on timing"
        yield case.error("update_weight_pause", rule, "use drain", also=["deterministic"])


def offpolicy(case: Case) -> Iterable[Problem]:
    """Check the flags for tokens from older policies."""
    args = case.args
    if args.use_tis and args.offpolicy_correction == "none":
        rule = "cannot be combined with --offpolicy-correction none"
        yield case.error("use_tis", rule, "leave one of the two out", also=["offpolicy_correction"])
    if args.mask_offpolicy_in_partial_rollout and args.rollouts_ahead:
        rule = "train_async.py generates with older weights than it trains: hardly any token would be left to train on"
        remedy = "leave it out (--offpolicy-correction weights these tokens)"
        yield case.error("mask_offpolicy_in_partial_rollout", rule, remedy)
    weighs = args.offpolicy_correction != "none" or args.use_tis
    if args.loss_type == "custom_loss" and weighs and (args.partial_rollout or args.rollouts_ahead or args.use_tis):
        rule = "your loss must weight the tokens of LossInputs.weighted_R itself, or they count like all others"
        remedy = "call slime.algo.corrections.importance_weights in it, or give --offpolicy-correction none"
        yield case.warning("loss_type", rule, remedy, also=["offpolicy_correction"])
    if not args.tis_clip_low <= 1 <= args.tis_clip:
        field = "tis_clip_low" if args.tis_clip_low > 1 else "tis_clip"
        rule = "the clips exclude 1, which is the weight of a token whose policy has not changed"
        yield case.error(field, rule, "give --tis-clip-low <= 1 <= --tis-clip", also=["tis_clip_low", "tis_clip"])
