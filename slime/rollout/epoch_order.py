"""The order in which an epoch hands out the prompts of several files, each with a weight.

- Used by: `data_buffer`.
- Invariant: the order of an epoch follows from its number alone, so a checkpoint stores no more than a number and a
  place in the order. With weight w, the first k epochs have floor(w x k) or ceil(w x k) times each prompt of a file.

A file with weight 0.5 and prompts a b c d gives a b to epoch 0, c d to epoch 1, a b to epoch 2; with weight 1.5 it
gives a b c d a b to epoch 0, and c d a b c d to epoch 1. With a seed, every pass through the file has another order.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction


def epoch_order(sizes: Sequence[int], weights: Sequence[Fraction], *, epoch: int, seed: int | None) -> list[int]:
    """Return the indices of the prompts of this epoch, in order; the files' prompts are numbered one after the other.

    Args:
        sizes: the number of prompts in each file, or pattern of files, that has a weight of its own.
        seed: None: file by file, each in its own order. Otherwise the epoch is shuffled.
    """
    order: list[int] = []
    first = 0
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        start, stop = (int(weight * size * count) for count in (epoch, epoch + 1))
        passes = {place // size for place in range(start, stop)}
        orders = {each: _pass(size, None if weight.denominator == 1 else seed, number, each) for each in passes}
        order += [first + orders[place // size][place % size] for place in range(start, stop)]
        first += size
    if seed is not None:
        random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def _pass(size: int, seed: int | None, file: int, number: int) -> list[int]:
    """Return the order of one pass through a file. A whole weight needs none: the epoch is shuffled as a whole."""
    order = list(range(size))
    if seed is not None:
        random.Random(f"{seed}/{file}/{number}").shuffle(order)
    return order
