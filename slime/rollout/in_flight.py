"""TrackedSource: a data source that knows which groups it has handed out.

- Where it sits: between the rollout function and its data source, built in or a user's. The rollout manager saves its
  state, also while a rollout runs.
- Invariant: every group drawn is in exactly one place: in the source (given back), in flight, or forgotten (its rollout
  has been trained on). `state_dict` holds the first two.

    source --get_groups--> in flight --add_groups--> source
                               +-------forget------> trained on, or dropped and counted
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slime.core.sample import Sample
from slime.core.sample_columns import from_columns, to_columns
from slime.rollout.context import DataSource


@dataclass(frozen=True)
class _Drawn:
    """One group in flight."""

    rollout_id: int
    group: list[Sample]
    """The list that was handed out. A rollout function puts a finished sample in the place of the one drawn."""
    handed_out: list[Sample]
    """The samples that were in it. The rollout may change them in place, and then they are not reliable."""
    as_drawn: list[Sample]
    """Copies of these samples, made when they were handed out."""

    @property
    def index(self) -> int:
        return self.as_drawn[0].group_index

    def now(self) -> list[Sample]:
        """Return the finished samples with their tokens, and the others as they were drawn."""
        if len(self.group) != len(self.handed_out):
            return self.as_drawn
        return [
            as_drawn if sample is handed_out else sample
            for sample, handed_out, as_drawn in zip(self.group, self.handed_out, self.as_drawn, strict=True)
        ]


class TrackedSource:
    """A DataSource around another one.

    Call `forget(rollout_id)` once a rollout has been trained on. Until then, what it drew is saved as in flight: a run
    that resumes from that state makes the rollout again, from the same groups in the same order. Samples that were
    finished are not generated again, and samples that had a reward are not judged again.
    """

    def __init__(self, source: DataSource) -> None:
        self._source = source
        self._in_flight: dict[int, _Drawn] = {}
        """The groups handed out by a serial number, in the order in which they were drawn."""
        self._serials: dict[int, deque[int]] = {}
        """The serial numbers of each group_index; a user's source may give several groups the same one."""
        self._next_serial = 0
        self._restored: list[list[Sample]] = []
        """Groups that were in flight when the state was saved; they are handed out before all others."""

    def __getattr__(self, name: str) -> Any:
        """Pass other attributes on to the user's own data source."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._source, name)

    @property
    def num_prompts(self) -> int:
        return self._source.num_prompts

    @property
    def num_in_flight(self) -> int:
        """The number of groups drawn and neither given back nor forgotten."""
        return len(self._in_flight)

    def get_groups(self, num: int, *, rollout_id: int) -> list[list[Sample]]:
        """Return `num` groups: first those that were in flight when the state was saved, in their order."""
        groups = self._restored[:num]
        if len(groups) < num:
            groups += self._source.get_groups(num - len(groups), rollout_id=rollout_id)
        del self._restored[:num]
        for group in groups:
            drawn = _Drawn(rollout_id, group, list(group), [sample.copy() for sample in group])
            self._in_flight[self._next_serial] = drawn
            self._serials.setdefault(drawn.index, deque()).append(self._next_serial)
            self._next_serial += 1
        return groups

    def add_groups(self, groups: Sequence[list[Sample]]) -> None:
        """Give groups back to the source."""
        self._source.add_groups(groups)
        for group in groups:
            serials = self._serials.get(group[0].group_index)
            if serials:
                self._remove(serials[0])

    def forget(self, rollout_id: int) -> None:
        """Record that this rollout and all before it were trained on; groups not given back are used up."""
        for serial in [serial for serial, drawn in self._in_flight.items() if drawn.rollout_id <= rollout_id]:
            self._remove(serial)

    def _remove(self, serial: int) -> None:
        """Remove one group from those in flight."""
        index = self._in_flight.pop(serial).index
        self._serials[index].remove(serial)
        if not self._serials[index]:
            del self._serials[index]

    def state_dict(self, *, as_drawn: bool = False) -> dict[str, Any]:
        """Return the state as plain JSON types and arrays; this may be called while a rollout runs.

        `as_drawn` leaves out what the groups in flight have become since they were drawn.
        """
        in_flight = [drawn.as_drawn if as_drawn else drawn.now() for drawn in self._in_flight.values()]
        in_flight += self._restored
        return {
            "source": self._source.state_dict(),
            "in_flight": to_columns(in_flight),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; nothing is in flight then."""
        self._source.load_state_dict(state["source"])
        self._restored = from_columns(state["in_flight"])
        self._in_flight.clear()
        self._serials.clear()
