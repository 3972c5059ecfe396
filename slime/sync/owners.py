"""Weights by broadcast from the trainers that own them: pipeline stages and expert ranks send in turns.

- Where it sits: `open` chooses it instead of `broadcast` where weights are split over pipeline stages or expert ranks.
  Every trainer opens it. Those that own a part have a weight group each, with all engines.
- Invariant: no weight crosses from one stage or expert rank to another. One owner sends at a time, so engines see one
  bucket after another as from a single sender. The policy version comes with the last bucket of the last turn, after
  all trainers have found their weights finite.

For example, two stages of a dense model; time goes down, and "meet" is a message among the owners:

    stage 0 (rank 0)                     stage 1
    pause engines, begin a session
    meet                                 meet
    turn 0: stream, announce, broadcast
    meet                                 meet
    check that weights are finite        turn 1: stream; check that weights are finite; send the last bucket, VERSION
    meet                                 meet
    end the session, continue

At each meeting the owners tell each other of an error, which rank 0 raises. After one nobody sends any more, but all
trainers run through their streams, which are collective over tensor-parallel ranks, and through the check, which is
collective over all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from itertools import chain

import torch.distributed as dist

from slime.core.errors import RunError
from slime.core.pausing import PauseChoice
from slime.core.weight_parts import WeightPart
from slime.engine.bucket_layout import NamedTensor
from slime.engine.client import EngineClient
from slime.engine.protocol import weight_groups
from slime.sync.broadcast import BroadcastTransport
from slime.sync.transport import DRAIN_WITHIN_S, Opening, SyncReport, Transport, drain

logger = logging.getLogger(__name__)


class OwnersTransport(Transport):
    """One trainer's side of it; all calls are collective over the trainers. Rank 0 pauses and checks all engines."""

    engines_generate = True

    def __init__(
        self,
        client: EngineClient,
        *,
        rank: int,
        owners: dist.ProcessGroup | None,
        pause: PauseChoice = "drain",
        drain_within: float = DRAIN_WITHIN_S,
    ) -> None:
        """`owners` are the trainers that own parts, in a gloo group; None if this one is none of them."""
        super().__init__(client, bucket_bytes=0, pause=pause, drain_within=drain_within)
        self.asks_engines = rank == 0
        self._rank = rank
        self._owners = owners
        self._link: BroadcastTransport | None = None
        """Sends this trainer's parts, over a client of its own; None if it owns none, or has not joined the engines."""

    @classmethod
    def open(cls, opening: Opening) -> OwnersTransport:
        """Open it on every trainer; the owners join the engines one after another, each in a group of its own."""
        rank = opening.rank
        owns: list[bool] = [False] * dist.get_world_size()
        dist.all_gather_object(owns, any(part.sent for part in opening.parts))
        owners = [owner for owner, is_owner in enumerate(owns) if is_owner]
        made = dist.new_group(owners, backend="gloo", timeout=timedelta(seconds=opening.args.train_timeout))
        group = made if rank in owners and isinstance(made, dist.ProcessGroup) else None
        client = opening.client() if rank == 0 else EngineClient("", engines=())
        transport = cls(
            client,
            rank=rank,
            owners=group,
            pause=opening.args.update_weight_pause,
            drain_within=opening.args.engine_request_timeout,
        )
        # One after another: an engine that joins two groups at once could wait in one that others join later.
        for name, owner in zip(weight_groups(len(owners)), owners, strict=True) if rank in owners else ():
            problem: RuntimeError | None = None
            if owner == rank:
                try:
                    transport._join(opening, name)
                except RuntimeError as error:
                    problem = error
            try:
                transport._meet(problem)
            except RuntimeError:
                transport.leave()  # torch keeps a group's name until the group is left
                raise
        return transport

    def _join(self, opening: Opening, group_name: str) -> None:
        """Join all engines in a group of that name, as its rank 0."""
        self._link = BroadcastTransport.of(opening, group_name)

    def send(self, tensors: Iterable[NamedTensor], *, version: int) -> SyncReport:
        raise NotImplementedError("owners send parts; call send_parts")

    def send_parts(self, parts: Sequence[WeightPart], *, check: Callable[[], None], version: int) -> SyncReport:
        """Send this trainer's parts in their turns; the engines then report `version`.

        `check` is collective over all trainers, and is called once by each, after its last stream. It raises RunError
        if weights are not finite; then the last bucket, with the version, is never sent.

        Raises:
            RuntimeError: on rank 0, an engine refused one of the parts, or did not answer.
        """
        check = _Once(check)
        if self._link is None:
            for part in parts:
                drain(part.tensors())
            check()
            return SyncReport(seconds=0.0, bytes=0)
        start, waited = time.perf_counter(), 0.0
        problem: RuntimeError | None = None
        with ExitStack() as stack:
            if self._rank == 0:
                try:
                    waited = stack.enter_context(self.updating())
                except RuntimeError as error:
                    problem = error
            total = self._take_turns(self._link, parts, check, version, problem)
        if self._rank > 0:
            return SyncReport(seconds=0.0, bytes=0)
        return SyncReport(seconds=time.perf_counter() - start - waited, bytes=total, waited=waited)

    def _take_turns(
        self,
        link: BroadcastTransport,
        parts: Sequence[WeightPart],
        check: Callable[[], None],
        version: int,
        problem: RuntimeError | None,
    ) -> int:
        """Return the bytes that all owners have sent."""
        own = 0
        problem, _ = self._met(problem)
        last = parts[0].num_turns - 1
        for turn in range(last + 1):
            for part in [part for part in parts if part.turn == turn]:
                stream = _checked(part.tensors(), check) if turn == last else part.tensors()
                if part.sent and problem is None:
                    try:
                        own += self._send(link, stream, turn, version if turn == last else None)
                    except RunError:
                        raise  # the check's, which all trainers raise
                    except RuntimeError as error:
                        problem = error
                drain(stream)  # peers need this trainer to the end of each stream
            if turn == last:
                check()
            problem, total = self._met(problem, own)
        if problem is not None:
            if self._rank == 0:
                raise problem
            logger.warning("the weight sync has failed, which rank 0 raises: %s", problem)
        return total

    def _send(self, link: BroadcastTransport, tensors: Iterator[NamedTensor], turn: int, version: int | None) -> int:
        """Send one part; a stage may have no experts."""
        first = next(tensors, None)
        return 0 if first is None else link.send_part(chain([first], tensors), part=turn, version=version)

    def _meet(self, problem: RuntimeError | None) -> None:
        """Wait for all owners; raise the error of one on all."""
        found, _ = self._met(problem)
        if found is not None:
            raise found

    def _met(self, problem: RuntimeError | None, own: int = 0) -> tuple[RuntimeError | None, int]:
        """Wait for all owners; return the first error of one, and the sum of `own`."""
        assert self._owners is not None, "only owners meet"
        mine = (None if problem is None else f"trainer {self._rank}: {problem}", own)
        found: list[tuple[str | None, int]] = [mine] * self._owners.size()
        dist.all_gather_object(found, mine, group=self._owners)
        texts = [text for text, _ in found if text is not None]
        if problem is None and texts:
            problem = RuntimeError(texts[0])
        return problem, sum(size for _, size in found)

    def leave(self) -> None:
        if self._link is not None:
            self._link.leave()
        super().leave()

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
        super().close()


class _Once:
    """Calls a function the first time only."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function: Callable[[], None] | None = function

    def __call__(self) -> None:
        function, self._function = self._function, None
        if function is not None:
            function()


def _checked(tensors: Iterator[NamedTensor], check: Callable[[], None]) -> Iterator[NamedTensor]:
    """Yield the tensors, and check all weights before the stream ends."""
    yield from tensors
    check()
