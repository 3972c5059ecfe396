"""OneAhead: which rollout is generated in advance, and who waits for it."""

from __future__ import annotations

from slime.config.args import Args
from slime.rollout.ahead import OneAhead


def made(args: Args, begun: list[int], *, last: int = 2) -> OneAhead[str]:
    def begin(rollout_id: int) -> str:
        begun.append(rollout_id)
        return f"rollout {rollout_id}"

    return OneAhead(begin, args, last=last)


def test_each_rollout_begins_once_and_in_order() -> None:
    begun: list[int] = []
    ahead = made(Args(), begun, last=3)
    for rollout in range(3):
        assert ahead.take(rollout) == f"rollout {rollout}"
        ahead.follow(rollout)
        assert begun == list(range(min(rollout + 2, 3)))
    assert ahead.current is None


def test_a_sync_waits_with_drain_alone() -> None:
    for pause, waits in (("drain", "rollout 1"), ("abort", None)):
        ahead = made(Args(update_weight_pause=pause), [])
        assert ahead.drained is None
        ahead.follow(0)
        assert ahead.drained == waits


def test_a_save_waits_with_deterministic_alone() -> None:
    for deterministic, waits in ((True, "rollout 1"), (False, None)):
        ahead = made(Args(deterministic=deterministic), [])
        ahead.follow(0)
        assert ahead.settled == waits
