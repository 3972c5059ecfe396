"""OneAhead: which rollout is generated while another is trained on, and who waits for it.

- Used by: the verbs of the training loop: those of `cluster.Cluster`, and the simulated ones.
- Invariant: at most one rollout is generated ahead, and rollouts begin in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from slime.config.args import Args

G = TypeVar("G")


class OneAhead(Generic[G]):
    """The rollout ahead of a run whose last rollout is `last - 1`; `begin` starts to generate a rollout.

    >>> ahead = OneAhead(lambda number: f"rollout {number}", Args(update_weight_pause="drain"), last=2)
    >>> ahead.take(0), ahead.follow(0), ahead.current, ahead.drained
    ('rollout 0', None, 'rollout 1', 'rollout 1')
    >>> ahead.take(1), ahead.follow(1), ahead.current
    ('rollout 1', None, None)
    """

    def __init__(self, begin: Callable[[int], G], args: Args, *, last: int) -> None:
        self._begin = begin
        self._args = args
        self._last = last
        self.current: G | None = None
        """The rollout that was begun ahead."""

    def take(self, rollout_id: int) -> G:
        """Return this rollout: the one ahead, or one that begins now. Wait until it is whole, then `follow`."""
        return self._begin(rollout_id) if self.current is None else self.current

    def follow(self, rollout_id: int) -> None:
        """Begin the rollout after `rollout_id`, which is whole; after the last one there is none."""
        self.current = self._begin(rollout_id + 1) if rollout_id + 1 < self._last else None

    @property
    def drained(self) -> G | None:
        """The rollout that a weight sync waits for, with --update-weight-pause drain."""
        return self.current if self._args.update_weight_pause == "drain" else None

    @property
    def settled(self) -> G | None:
        """The rollout that a save waits for, with --deterministic: after a resume its other half would differ."""
        return self.current if self._args.deterministic else None
