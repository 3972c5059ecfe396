"""Rules for the optimizer and its schedules.

- Used by: `rules.check`.
- Invariant: Megatron can build an optimizer and schedules that pass.
"""

from __future__ import annotations

from collections.abc import Iterable

from slime.config.epochs import planned_rollouts
from slime.config.problem import Problem
from slime.config.resolve import cuda_available
from slime.config.rules.case import Case
from slime.config.rules.megatron_fields import OFFLOAD_OF_MEGATRON

LENGTH = ("lr_decay_iters", "num_rollout", "num_epoch", "num_steps_per_rollout", "global_batch_size")
"""The fields that determine the schedule's length."""


def optimizer(case: Case) -> Iterable[Problem]:
    """Check that Megatron can shard the chosen optimizer."""
    if case.args.use_distributed_optimizer and case.args.optimizer != "adam":
        rule = f"Megatron can only shard adam, not --optimizer {case.args.optimizer}"
        yield case.error("use_distributed_optimizer", rule, "leave one of the two out", also=["optimizer"])


def cpu_offload(case: Case) -> Iterable[Problem]:
    """Check the flags for an optimizer in host memory."""
    args = case.args
    passed = [name for name in args.megatron_extra if name in OFFLOAD_OF_MEGATRON]
    if passed:
        yield Problem(
            severity="warning",
            where=" ".join("--" + name.replace("_", "-") for name in passed),
            rule="no effect: it belongs to Megatron's own offload; slime's offload moves the whole optimizer state",
            remedy="leave it out, and give --optimizer-cpu-offload",
        )
    if not args.optimizer_cpu_offload:
        return
    if args.optimizer != "adam":
        rule = f"only adam's state can be kept in host memory, not --optimizer {args.optimizer}'s"
        yield case.error("optimizer_cpu_offload", rule, "leave one of the two out", also=["optimizer"])
    elif args.megatron_extra.get("decoupled_weight_decay") is False:
        rule = "it requires AdamW, whose weight decay is decoupled, not --no-decoupled-weight-decay"
        yield case.error("optimizer_cpu_offload", rule, "leave one of the two out")
    elif case.real and not cuda_available():
        rule = "no effect: this machine has no CUDA, so everything is in host memory"
        yield case.warning("optimizer_cpu_offload", rule, "leave it out")


def _takes_steps(case: Case) -> bool:
    """Return whether the run takes optimizer steps; without them it needs no schedule."""
    return case.args.num_rollout != 0 and not case.args.debug_rollout_only


def _decay_steps(case: Case) -> int | None:
    """Return the optimizer step at which the decay ends, or None if it is not known yet."""
    args = case.args
    if args.lr_decay_iters is not None:
        return args.lr_decay_iters
    rollouts = planned_rollouts(args)
    critics = args.num_critic_only_steps if args.uses_critic else 0
    return None if rollouts is None else max(rollouts - critics, 0) * args.resolved.num_steps_per_rollout


def decay(case: Case) -> Iterable[Problem]:
    """Check the rates and the length of the learning rate's decay."""
    args = case.args
    if args.lr_decay_style == "constant" or not _takes_steps(case):
        return
    if args.min_lr > args.lr > 0:
        yield case.error("min_lr", f"the decay would end above --lr {args.lr:g}", "lower it", also=["lr"])
    if args.lr_decay_style != "WSD":
        return
    if args.lr_wsd_decay_iters is None:
        remedy = "add --lr-wsd-decay-iters"
        yield case.error("lr_decay_style", "WSD needs a decay length", remedy, also=["lr_wsd_decay_iters"])
        return
    steps = _decay_steps(case)
    if steps is not None and args.lr_wsd_decay_iters > steps - _warm_up_steps(case, steps):
        rule = f"the decay that ends at optimizer step {steps} would begin during the warm-up or before the run"
        remedy = "lower it, or raise --lr-decay-iters, --num-rollout or --num-epoch"
        about = (*LENGTH, "lr_warmup_iters", "lr_warmup_fraction")
        yield case.error("lr_wsd_decay_iters", rule, remedy, also=about)


def _warm_up_steps(case: Case, decay_steps: int) -> float:
    fraction = case.args.lr_warmup_fraction
    return case.args.lr_warmup_iters if fraction is None else fraction * decay_steps


def warm_up(case: Case) -> Iterable[Problem]:
    """Check the rate and the length of the learning rate's warm-up."""
    args = case.args
    if not _takes_steps(case):
        return
    if args.lr_warmup_fraction is not None and args.lr_warmup_iters > 0:
        rule = f"cannot be combined with --lr-warmup-iters {args.lr_warmup_iters}"
        yield case.error("lr_warmup_fraction", rule, "leave one of the two out", also=["lr_warmup_iters"])
        return
    if args.lr_warmup_init > args.lr:
        rule = f"the warm-up would begin above --lr {args.lr:g}"
        yield case.error("lr_warmup_init", rule, "lower it", also=["lr"])
    if args.lr_decay_style == "constant":
        return
    steps = _decay_steps(case)
    if steps is not None and args.lr_warmup_iters >= max(steps, 1):
        rule = f"the warm-up must end before the decay ends, at optimizer step {steps}"
        remedy = "lower it, or raise --lr-decay-iters, --num-rollout or --num-epoch"
        yield case.error("lr_warmup_iters", rule, remedy, also=LENGTH)


def weight_decay(case: Case) -> Iterable[Problem]:
    """Check that the weight decay's style and its ends fit each other."""
    args = case.args
    ends = {"start_weight_decay": args.start_weight_decay, "end_weight_decay": args.end_weight_decay}
    about = ("weight_decay_incr_style", *ends)
    if args.weight_decay_incr_style == "constant":
        for field in (field for field, value in ends.items() if value is not None):
            rule = "--weight-decay-incr-style constant keeps --weight-decay"
            remedy = "leave it out, or give --weight-decay-incr-style linear or cosine"
            yield case.error(field, rule, remedy, also=about)
    elif args.start_weight_decay is None or args.end_weight_decay is None:
        remedy = "give --start-weight-decay and --end-weight-decay"
        yield case.error("weight_decay_incr_style", "needs a first and a last value", remedy, also=about)
    elif args.start_weight_decay > args.end_weight_decay:
        rule = f"greater than --end-weight-decay {args.end_weight_decay:g}: Megatron's weight decay can only grow"
        yield case.error("start_weight_decay", rule, "make it the smaller one", also=about)


def resumed_schedule(case: Case) -> Iterable[Problem]:
    """Check that at most one schedule is chosen for a resumed run."""
    if {"use_checkpoint_opt_param_scheduler", "override_opt_param_scheduler"} <= case.given and (
        case.args.use_checkpoint_opt_param_scheduler and case.args.override_opt_param_scheduler
    ):
        yield case.error(
            "use_checkpoint_opt_param_scheduler",
            "cannot be combined with --override-opt-param-scheduler",
            "leave one of the two out",
        )
