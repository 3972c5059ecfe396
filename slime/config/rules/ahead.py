"""Rules about a program that generates a rollout while it trains on the one before: train_async.py.

Path: part of `rules`. Invariant: what passes here names, for every token, the one policy that made it.
"""

from __future__ import annotations

from collections.abc import Iterable

from slime.config.rules.case import Case
from slime.config.rules.problem import Problem


def ahead(case: Case) -> Iterable[Problem]:
    args = case.args
    if not args.rollouts_ahead:
        return
    if args.colocate:
        rule = "train_async.py generates while it trains, so engines and trainers need devices of their own"
        yield case.error("colocate", rule, "leave it out and give --rollout-num-gpus, or start train.py")
    if args.max_staleness is not None and args.max_staleness < args.rollouts_ahead:
        rule = "train_async.py trains on what the policy before has generated: a token lags behind by 1 at least"
        yield case.error("max_staleness", rule, "make it at least 1, or start train.py")
    if not args.num_engines or args.debug_rollout_only:
        return  # no weights are sent
    if args.update_weight_pause in ("in_place", "retract"):
        rule = "with train_async.py requests are in flight, and their answers would name the later of two policies only"
        yield case.error("update_weight_pause", rule, "take drain or abort")
    elif args.deterministic and args.update_weight_pause == "abort":
        rule = "beside --deterministic: which token is the last of the old weights would depend on the moment"
        yield case.error("update_weight_pause", rule, "take drain", beside=["deterministic"])
