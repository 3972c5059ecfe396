"""Rules about responses that are made in several rollouts.

Path: part of `rules`. Invariant: what passes here leaves groups unfinished, and with --deterministic by a count of
tokens, never by the clock.
"""

from __future__ import annotations

from collections.abc import Iterable

from slime.config.flags.options import HookOptions
from slime.config.rules.case import Case
from slime.config.rules.problem import Problem


def partial_rollout(case: Case) -> Iterable[Problem]:
    args = case.args
    most = args.partial_rollout_max_tokens
    if not args.partial_rollout:
        if most is not None:
            yield _vain(case, "partial_rollout_max_tokens", "it belongs to --partial-rollout", "add --partial-rollout")
        if args.mask_offpolicy_in_partial_rollout and not args.rollouts_ahead:
            why = "it belongs to --partial-rollout"
            yield _vain(case, "mask_offpolicy_in_partial_rollout", why, "add --partial-rollout")
    elif args.rollout_function_path != HookOptions.rollout_function_path:
        why = "--rollout-function-path stands in for the function that leaves responses unfinished"
        yield _vain(case, "partial_rollout", why, "leave it out, unless your function reads args.partial_rollout")
    elif args.deterministic and most is None:
        rule = "beside --deterministic: how far a response has come when it is aborted depends on the clock"
        remedy = "add --partial-rollout-max-tokens, after which a response is set aside"
        about = ("deterministic", "partial_rollout_max_tokens")
        yield case.error("partial_rollout", rule, remedy, beside=about)
    elif most is not None and most >= args.rollout_max_response_len:
        why = f"--rollout-max-response-len {args.rollout_max_response_len} ends a response before"
        yield _vain(case, "partial_rollout_max_tokens", why, "lower it")
    elif most is None and not _leaves_unfinished(case):
        why = "nothing is sampled beyond what is needed, so nothing is ever left unfinished"
        yield _vain(case, "partial_rollout", why, "raise --over-sampling-batch-size")
    if args.max_staleness is not None and not args.partial_rollout and not args.rollouts_ahead:
        why = "every token is of the weights that are trained; it belongs to --partial-rollout and train_async.py"
        yield _vain(case, "max_staleness", why, "leave it out")


def _leaves_unfinished(case: Case) -> bool:
    args = case.args
    return args.over_sampling_batch_size != args.rollout_batch_size or args.dynamic_sampling_filter_path is not None


def _vain(case: Case, field: str, why: str, remedy: str) -> Problem:
    return case.warning(field, f"no effect: {why}", remedy)
