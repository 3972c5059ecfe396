"""Rules for the advantage estimator, its form of the policy loss, and its critic.

- Used by: `rules.check`; `slime.algo.estimators` has the facts about each estimator.
- Invariant: a run that passes learns from every sample that it generates, by the formula that the flags name, and
  training can build and load its critic.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from slime.algo.estimators import ESTIMATOR_FACTS
from slime.config.epochs import planned_rollouts
from slime.config.problem import Problem
from slime.config.rules.case import Case
from slime.config.vocabulary import vocabulary_text
from slime.core.small_files import is_file

WIDE_FOR_A_SEQUENCE = 0.05
"""A clip range that hardly any response's mean ratio leaves; gspo's paper uses less than a hundredth of it."""


def group_size(case: Case) -> Iterable[Problem]:
    """Check that there are several samples per prompt if the estimator or a filter compares them."""
    args = case.args
    if args.resolved.n_samples_per_prompt > 1:
        return
    trains = not args.debug_rollout_only and args.num_rollout != 0
    if trains and args.compares_group:
        rule = f"{args.advantage_estimator} compares the samples of one prompt, and there is only one"
        remedy = "make it at least 2, or use --advantage-estimator reinforce_plus_plus"
        yield case.error("n_samples_per_prompt", rule, remedy, also=["advantage_estimator"])
    if (args.dynamic_sampling_filter_path or "").endswith(".check_reward_nonzero_std"):
        rule = "check_reward_nonzero_std would drop every group, because a single reward has no spread"
        remedy = "make it at least 2, or leave the filter out"
        yield case.error("n_samples_per_prompt", rule, remedy, also=["dynamic_sampling_filter_path"])


def surrogate(case: Case) -> Iterable[Problem]:
    """Check flags that gspo's and cispo's forms of the policy loss do not have or use differently."""
    args = case.args
    if not case.trains_policy:
        return
    form = ESTIMATOR_FACTS[args.advantage_estimator].surrogate
    if form == "cispo" and args.eps_clip_c is not None:
        rule = "cispo clips a weight and has no clipped objective that a dual clip could bound"
        yield case.error("eps_clip_c", rule, "leave it out", also=["advantage_estimator"])
    if form != "sequence":
        return
    if args.resolved.num_steps_per_rollout > 1 and args.eps_clip >= WIDE_FOR_A_SEQUENCE:
        rule = "gspo's ratio is a mean over the response and hardly ever this far from 1: nothing would be clipped"
        remedy = "give --eps-clip 3e-4 --eps-clip-high 4e-4, as in its paper"
        yield case.warning("eps_clip", rule, remedy, also=["advantage_estimator", "num_steps_per_rollout"])
    if args.calculate_per_token_loss:
        rule = "gspo weights all responses equally, but this flag weights each by its length"
        yield case.warning("calculate_per_token_loss", rule, "leave it out", also=["advantage_estimator"])


def overlong(case: Case) -> Iterable[Problem]:
    """Check that the length penalty does not cover the whole response."""
    args = case.args
    buffer = args.overlong_buffer_len
    if buffer is not None and case.trains_policy and buffer >= args.rollout_max_response_len:
        rule = f"--rollout-max-response-len is {args.rollout_max_response_len}: every response would be punished"
        yield case.error("overlong_buffer_len", rule, "lower it", also=["rollout_max_response_len"])


def teacher(case: Case) -> Iterable[Problem]:
    """Check that the teacher is another model than the student, with the same tokenizer."""
    args = case.args
    if not args.distills or args.debug_rollout_only or args.ref_load is None or args.hf_checkpoint is None:
        return
    student, taught_by = Path(args.hf_checkpoint), Path(args.ref_load)
    about = ("hf_checkpoint", "advantage_estimator")
    if os.path.realpath(student) == os.path.realpath(taught_by):
        rule = "teacher and student are the same model: every advantage would be 0"
        yield case.error("ref_load", rule, "name the teacher here, and the student by --hf-checkpoint", also=about)
    files = [folder / "tokenizer.json" for folder in (student, taught_by)]
    if all(is_file(file) for file in files) and len({vocabulary_text(file) for file in files}) > 1:
        rule = f"its tokenizer differs from that of --hf-checkpoint {student}: a token means another text to each model"
        yield case.error("ref_load", rule, "use a teacher with the student's tokenizer", also=about)


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
    steps = args.lr_decay_iters or (None if rollouts is None else rollouts * args.resolved.num_steps_per_rollout)
    if steps is not None and args.critic_lr_warmup_iters >= steps:
        rule = f"the warm-up must end before the decay ends, at optimizer step {steps}"
        remedy = "lower it, or raise --lr-decay-iters, --num-rollout or --num-epoch"
        yield case.error("critic_lr_warmup_iters", rule, remedy, also=["lr_decay_iters", "num_rollout", "num_epoch"])
