"""Rules for train_async.py, which generates a rollout while it trains on the previous one.

- Used by: `rules.check`.
- Invariant: in a run that passes, every token is recorded with the one policy version that generated it.
"""

from __future__ import annotations

from collections.abc import Iterable

from slime.config.rules.case import Case
from slime.config.rules.problem import Problem


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
