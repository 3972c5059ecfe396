"""The rule for partial rollouts, in which a response is generated over several rollouts.

- Used by: `rules.check`.
- Invariant: in a run that passes, groups can be left unfinished; with --deterministic a token count decides which,
  never the clock.
"""

from __future__ import annotations

from collections.abc import Iterable

from slime.config.flags.options import HookOptions
from slime.config.rules.case import Case
from slime.config.rules.problem import Problem


def partial_rollout(case: Case) -> Iterable[Problem]:
    """Check the flags for partial rollouts, and warn about those without effect."""
    args = case.args
    most = args.partial_rollout_max_tokens
    if not args.partial_rollout:
        if most is not None:
            yield _vain(case, "partial_rollout_max_tokens", "it belongs to --partial-rollout", "add --partial-rollout")
        if args.mask_offpolicy_in_partial_rollout and not args.rollouts_ahead:
            why = "it belongs to --partial-rollout"
            yield _vain(case, "mask_offpolicy_in_partial_rollout", why, "add --partial-rollout")
    elif args.rollout_function_path != HookOptions.rollout_function_path:
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
