"""The rule for off-policy tokens: only one treatment of them is chosen, and tokens are left to train on.

- Used by: `rules.check`; `no_effect_algorithms` uses `may_be_offpolicy`.
- Invariant: the trainer's `offpolicy` does what flags that pass describe.
"""

from __future__ import annotations

from collections.abc import Iterable

from slime.config.args import Args
from slime.config.flags.options import HookOptions
from slime.config.rules.case import Case
from slime.config.rules.problem import Problem


def may_be_offpolicy(args: Args) -> bool:
    """Return whether training may see tokens from an older policy."""
    own = (args.rollout_function_path, args.data_source_path, args.custom_convert_samples_to_train_data_path)
    default = HookOptions()
    usual = (default.rollout_function_path, default.data_source_path, default.custom_convert_samples_to_train_data_path)
    replayed = args.load_debug_rollout_data is not None
    return args.partial_rollout or args.rollouts_ahead > 0 or replayed or own != usual


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
