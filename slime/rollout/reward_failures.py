"""Count the failed rewards of a rollout, and end the run if there are too many.

- Called by: `collect`, with every group that it settles.
- Invariant: a failed reward costs its sample and is counted. The run ends only if the share of a rollout's samples
  without a reward exceeds --max-reward-failures. The share is taken of at least a whole batch of samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from slime.config.args import Args
from slime.core.sample import Sample
from slime.rollout.reward_pool.verdict import NO_ENTRY, failure_kind

GENERATION_FAILED = "generation_failed"
"""The kind of failure that comes from generation, not from a reward."""


class RewardFailures:
    """The reward failures of one rollout."""

    def __init__(self, args: Args, rollout_id: int) -> None:
        self._share = args.max_reward_failures
        self._batch = args.rollout_batch_size * args.n_samples_per_prompt
        self._rollout_id = rollout_id
        self._judged = 0
        self._failed: Counter[str] = Counter()
        self._last: dict[str, str] = {}

    def count(self, samples: Iterable[Sample]) -> None:
        """Count the samples of a group that has ended.

        Raises:
            RuntimeError: too many samples have no reward; the error names the reasons, each with its number.
            ValueError: too many have no reward, and always because --reward-key names nothing in their dicts.
        """
        for sample in samples:
            kind = None if sample.reward_failure is None else failure_kind(sample.reward_failure)
            if kind == GENERATION_FAILED:
                continue
            self._judged += sample.reward is not None or kind is not None
            if kind is not None:
                self._failed[kind] += 1
                self._last[kind] = str(sample.reward_failure)
        failed = self._failed.total()
        if failed > self._share * max(self._judged, self._batch):
            reasons = ", ".join(f"{count} by {kind}" for kind, count in self._failed.most_common())
            last = "; ".join(text for kind, text in self._last.items() if failure_kind(text) != text)
            is_flag = set(self._failed) == {failure_kind(NO_ENTRY)}
            remedy = "correct --reward-key" if is_flag else "correct the reward, give it more time (--rm-timeout)"
            raise (ValueError if is_flag else RuntimeError)(
                f"rollout {self._rollout_id}: {failed} of {self._judged} judged samples have no reward, more than "
                f"--max-reward-failures {self._share:g} allows: {reasons}{f' (the last: {last})' if last else ''}; "
                f"{remedy}, or raise --max-reward-failures"
            )
