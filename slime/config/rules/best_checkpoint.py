"""The rule for --keep-best-checkpoint: evaluation reports the metric, for checkpoints that are saved and evaluated.

- Used by: `rules.check`.
- Invariant: a metric that passes is missing later only if the rewards do not have the form that it is computed from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from slime.config.epochs import planned_rollouts
from slime.config.eval_data import eval_datasets
from slime.config.problem import Problem
from slime.config.rules.case import Case

_METRIC = re.compile(r"eval/(?P<name>.+)/(?P<what>[^/]+)")
LOSSES = ("loss", "loss_per_sample")
"""The metrics of SFT's evaluation."""
_FIELD = "keep_best_checkpoint"


def best_checkpoint(case: Case) -> Iterable[Problem]:
    """Check that --keep-best-checkpoint names a metric that evaluation reports."""
    args = case.args
    metric = args.keep_best_checkpoint
    if metric is None or not args.saves:
        return  # no effect, which another rule reports
    if not case.evaluates or args.debug_train_only:
        about = ("eval_prompt_data", "eval_config", "debug_train_only")
        yield case.error(_FIELD, "nothing is evaluated", "add --eval-prompt-data or --eval-config", also=about)
        return
    parts = _METRIC.fullmatch(metric)
    if parts is None:
        yield case.error(_FIELD, "is not an evaluation metric", "write it as eval/NAME/reward")
        return
    if args.eval_function_path is None or args.validates:
        yield from _unknown(case, parts["name"], parts["what"])
    yield from _one_alone(case)


def _unknown(case: Case, name: str, what: str) -> Iterable[Problem]:
    """Refuse a metric that the built-in evaluation does not report."""
    try:
        datasets = {dataset.name: dataset for dataset in eval_datasets(case.args)}
    except ValueError:  # `eval_files` reports it
        return
    about = ("eval_prompt_data", "eval_config", "n_samples_per_eval_prompt")
    if name not in datasets:
        remedy = f"name one of {', '.join(datasets)}"
        yield case.error(_FIELD, f"there is no evaluation set {name!r}", remedy, also=about)
        return
    ranked = ["reward", "reward_judged", "format", *(f"pass@{k}" for k in datasets[name].pass_at_ks)]
    if case.args.validates:
        ranked = list(LOSSES)
    if what not in ranked:
        better = "smaller" if case.args.validates else "larger"
        rule = f"{name} has no metric {what!r} of which a {better} value is better"
        yield case.error(_FIELD, rule, f"name one of {', '.join(ranked)}", also=about)


def _one_alone(case: Case) -> Iterable[Problem]:
    """Warn when only one checkpoint can be chosen.

    The last rollout is always saved and evaluated, another one only if both intervals divide its number. With
    --save-interval 4 and --eval-interval 6 that is every 12th rollout.
    """
    args = case.args
    num_rollouts = planned_rollouts(args)
    intervals = (args.save_interval, args.eval_interval)
    meet = None if None in intervals else math.lcm(*(interval for interval in intervals if interval is not None))
    if meet is None or (num_rollouts is not None and meet >= num_rollouts):
        rule = "only the last checkpoint is both saved and evaluated"
        remedy = "give both --save-interval and --eval-interval, one as a multiple of the other"
        about = ("save_interval", "eval_interval", "num_rollout", "num_epoch")
        yield case.warning(_FIELD, rule, remedy, also=about)
