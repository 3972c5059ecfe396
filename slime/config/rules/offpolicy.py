"""Rules about tokens of older weights: what is done to them is one thing, and leaves something to train on.

Path: part of `rules`. Invariant: what passes here, the trainer's `offpolicy` does as it is said.
"""

from __future__ import annotations

from collections.abc import Iterable

from slime.config.args import Args
from slime.config.flags.options import HookOptions
from slime.config.rules.case import Case
from slime.config.rules.problem import Problem


def may_be_offpolicy(args: Args) -> bool:
    """Whether any token that is trained on may be of older weights."""
    own = (args.rollout_function_path, args.data_source_path, args.custom_convert_samples_to_train_data_path)
    default = HookOptions()
    usual = (default.rollout_function_path, default.data_source_path, default.custom_convert_samples_to_train_data_path)
    replayed = args.load_debug_rollout_data is not None
    return args.partial_rollout or args.rollouts_ahead > 0 or replayed or own != usual


def offpolicy(case: Case) -> Iterable[Problem]:
    args = case.args
    if args.use_tis and args.offpolicy_correction == "none":
        rule = "stands beside --offpolicy-correction none, and weighs all tokens"
        yield case.error("use_tis", rule, "leave one of the two out", beside=["offpolicy_correction"])
    if args.mask_offpolicy_in_partial_rollout and args.rollouts_ahead:
        rule = "train_async.py generates with older weights than it trains: hardly a token would be left to train on"
        remedy = "leave it out (--offpolicy-correction weighs them)"
        yield case.error("mask_offpolicy_in_partial_rollout", rule, remedy)
    weighs = args.offpolicy_correction != "none" or args.use_tis
    if args.loss_type == "custom_loss" and weighs and (args.partial_rollout or args.rollouts_ahead or args.use_tis):
        rule = "your loss has to weigh the tokens of LossInputs.weighed_R itself, or they count like all others"
        remedy = "call slime.algo.corrections.importance_weights in it, or give --offpolicy-correction none"
        yield case.warning("loss_type", rule, remedy, beside=["offpolicy_correction"])
    if not args.tis_clip_low <= 1 <= args.tis_clip:
        field = "tis_clip_low" if args.tis_clip_low > 1 else "tis_clip"
        rule = "1 is beyond the clips, and that is the weight of a token whose policy has not changed"
        yield case.error(field, rule, "give --tis-clip-low <= 1 <= --tis-clip", beside=["tis_clip_low", "tis_clip"])
