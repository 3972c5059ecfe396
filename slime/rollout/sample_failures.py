"""Count the samples of a rollout that failed by user code, and end the run if there are too many.

- Called by: `collect`, with every group that it settles.
- Invariant: a reward or a custom generate function that fails costs its sample and is counted. The run ends only if the
  share of a rollout's samples exceeds --max-reward-failures or --max-generation-failures. The share is taken of at
  least a whole batch of samples. An engine that does not answer counts for neither.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from slime.config.args import Args
from slime.core.sample import Sample
from slime.rollout.reward_pool.verdict import NO_ENTRY, failure_kind

ENGINE_FAILED = "generation failed"
"""The beginning of a failure that comes from an engine."""
HOOK_FAILED = "generate function failed"
"""The beginning of a failure that a custom generate function raised."""


class SampleFailures:
    """The failures of one rollout, of rewards and of a custom generate function."""

    def __init__(self, args: Args, rollout_id: int) -> None:
        self._args = args
        self._batch = args.rollout_batch_size * args.resolved.n_samples_per_prompt
        self._rollout_id = rollout_id
        self._generated = 0
        self._not_generated = 0
        self._judged = 0
        self._failed: Counter[str] = Counter()
        self._last: dict[str, str] = {}

    def count(self, samples: Iterable[Sample]) -> None:
        """Count the samples of a group that has ended.

        Raises:
            RuntimeError: too many samples have failed; the error names the reasons, each with its number.
            ValueError: too many have no reward, and always because --reward-key names nothing in their dicts.
        """
        for sample in samples:
            kind = None if sample.reward_failure is None else failure_kind(sample.reward_failure)
            if kind == failure_kind(ENGINE_FAILED):
                continue
            if kind is not None:
                self._last[kind] = str(sample.reward_failure)
            is_ended = sample.reward is not None or kind is not None
            self._generated += is_ended
            if kind == failure_kind(HOOK_FAILED):
                self._not_generated += 1
                continue
            self._judged += is_ended
            if kind is not None:
                self._failed[kind] += 1
        self._check_rewards()
        self._check_generation()

    def _check_generation(self) -> None:
        share = self._args.max_generation_failures
        if self._not_generated > share * max(self._generated, self._batch):
            raise RuntimeError(
                f"rollout {self._rollout_id}: {self._not_generated} of {self._generated} samples were not generated, "
                f"more than --max-generation-failures {share:g} allows; the last: "
                f"{self._last[failure_kind(HOOK_FAILED)]}; correct the function (logs/rollout.log has whole "
                "tracebacks), or raise --max-generation-failures"
            )

    def _check_rewards(self) -> None:
        share, failed = self._args.max_reward_failures, self._failed.total()
        if failed <= share * max(self._judged, self._batch):
            return
        reasons = ", ".join(f"{count} by {kind}" for kind, count in self._failed.most_common())
        texts = (self._last[kind] for kind in self._failed)
        last = "; ".join(text for text in texts if failure_kind(text) != text)
        is_flag = set(self._failed) == {failure_kind(NO_ENTRY)}
        remedy = "correct --reward-key" if is_flag else "correct the reward, give it more time (--rm-timeout)"
        raise (ValueError if is_flag else RuntimeError)(
            f"rollout {self._rollout_id}: {failed} of {self._judged} judged samples have no reward, more than "
            f"--max-reward-failures {share:g} allows: {reasons}{f' (the last: {last})' if last else ''}; "
            f"{remedy}, or raise --max-reward-failures"
        )
