"""The rule for the critic's flags, among themselves and against the run's length.

- Used by: `rules.check`.
- Invariant: training can build and load a critic that passes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from slime.config.epochs import planned_rollouts
from slime.config.rules.case import Case
from slime.config.rules.problem import Problem


def critic(case: Case) -> Iterable[Problem]:
    """Check the length of the critic's own training, its checkpoint and its warm-up."""
    args = case.args
    if not args.uses_critic or args.debug_rollout_only or args.num_rollout == 0:
        return
    rollouts = planned_rollouts(args)
    if rollouts is not None and args.num_critic_only_steps >= rollouts:
        rule = f"only the critic learns in all {rollouts} rollouts: the policy never learns"
        remedy = "lower it, unless you only want a critic for --critic-load"
        yield case.warning("num_critic_only_steps", rule, remedy, also=["num_rollout", "num_epoch"])
    if args.critic_load is not None and not os.path.exists(args.critic_load):
        yield case.missing("critic_load", "there is no such directory", "name a checkpoint, or leave it out")
    if args.lr_decay_style == "constant":
        return
    assert args.num_steps_per_rollout is not None, "resolve fills it in"
    steps = args.lr_decay_iters or (None if rollouts is None else rollouts * args.num_steps_per_rollout)
    if steps is not None and args.critic_lr_warmup_iters >= steps:
        rule = f"the warm-up must end before the decay ends, at optimizer step {steps}"
        remedy = "lower it, or raise --lr-decay-iters, --num-rollout or --num-epoch"
        yield case.error("critic_lr_warmup_iters", rule, remedy, also=["lr_decay_iters", "num_rollout", "num_epoch"])
