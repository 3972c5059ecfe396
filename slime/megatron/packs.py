"""Packs: the micro-batches of one pass over the model, each packed shortly before the model runs on it.

- Used by: `trainer` makes one for each pass, and `step` reads it inside Megatron's schedule.
- Invariant: without virtual pipeline stages at most two micro-batches exist at a time: the one that runs, and the one
  after it. Virtual stages share them, and a micro-batch exists until the last stage of this rank has taken it.

A GPU works while its host goes on. So the next micro-batch is packed after the launch of a forward pass (`prepare`),
when the host would have nothing to do:

    host    | pack 0 | launch 0 | pack 1 | launch loss, backward 0 | launch 1 | pack 2 | ...
    device           | forward 0 .......................| backward 0 ........| forward 1 ...

This needs no thread: packing takes less time than a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from slime.core.architecture import Architecture
from slime.core.batch import TrainBatch
from slime.core.rank_batch import RankStep
from slime.megatron.microbatch import ContextParallel, MicroBatch, pack_rows, tokens_on_rank


class Packs:
    """Packs micro-batches one ahead, for one or more readers that each take all of them in order."""

    def __init__(self, pack: Callable[[Any], MicroBatch], contents: Sequence[Any], num_tokens: Sequence[int]) -> None:
        """`pack` makes a micro-batch of an entry of `contents`, with so many of `num_tokens` on this rank."""
        self.num_tokens = num_tokens
        """The tokens of each micro-batch on this rank, known before it is packed."""
        self._pack = pack
        self._contents = contents
        self._made: dict[int, tuple[MicroBatch, int]] = {}
        """The micro-batches by number, with the number of readers that have not taken it yet."""
        self._next = 0
        self._num_readers = 1
        self._taken = 0

    def __len__(self) -> int:
        return len(self._contents)

    def readers(self, count: int) -> list[Iterator[MicroBatch]]:
        """Return the iterators of `count` readers; this begins a pass."""
        self._num_readers, self._next, self._taken = count, 0, 0
        self._made.clear()
        self.prepare()
        return [self._read() for _ in range(count)]

    def prepare(self) -> None:
        """Pack the next micro-batch, unless one waits already that no reader has taken, or none is left."""
        if self._next < len(self._contents) and self._next == self._taken:
            self._made[self._next] = self._pack(self._contents[self._next]), self._num_readers
            self._next += 1

    def _read(self) -> Iterator[MicroBatch]:
        for number in range(len(self._contents)):
            yield self._take(number)  # without a variable, which would keep it until the next one is taken

    def _take(self, number: int) -> MicroBatch:
        if number == self._next:
            self.prepare()
        micro_batch, left = self._made.pop(number)
        self._taken = max(self._taken, number + 1)
        if left > 1:
            self._made[number] = micro_batch, left - 1
        return micro_batch


def packs_of(
    own: TrainBatch, steps: Sequence[RankStep], *, arch: Architecture, multiple: int, part: ContextParallel
) -> Packs:
    """Return the micro-batches of these steps of a rank's own rows, which are packed as the model takes them."""

    def pack(content: tuple[Sequence[int], int]) -> MicroBatch:
        rows, step_tokens = content
        return pack_rows(own, rows, arch=arch, multiple=multiple, part=part, step_tokens=step_tokens)

    contents = [(rows, step.num_tokens) for step in steps for rows in step.micro_batches]
    return Packs(pack, contents, [tokens_on_rank(own, rows, part, multiple) for rows, _ in contents])
