"""The order of an epoch: every prompt as often as its file's weight says, and the same order for the same epoch."""

from __future__ import annotations

import math
import random
from collections import Counter
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from slime.rollout.epoch_order import epoch_order

WEIGHTS = st.sampled_from([Fraction(text) for text in ("1", "2", "3", "0.5", "0.25", "1.5", "0.1", "2.7", "0.01")])


def test_the_docstrings_example() -> None:
    for weight, expected in (("0.5", ["ab", "cd", "ab"]), ("1.5", ["abcdab", "cdabcd", "abcdab"])):
        for epoch, letters in enumerate(expected):
            order = epoch_order([4], [Fraction(weight)], epoch=epoch, seed=None)
            assert "".join("abcd"[index] for index in order) == letters


@given(
    files=st.lists(st.tuples(st.integers(1, 12), WEIGHTS), min_size=1, max_size=3),
    epochs=st.integers(1, 9),
    seed=st.none() | st.integers(0, 5),
)
@settings(deadline=None, max_examples=200)
def test_each_prompt_comes_as_its_weight_says(files: list[tuple[int, Fraction]], epochs: int, seed: int | None) -> None:
    sizes, weights = [size for size, _ in files], [weight for _, weight in files]
    drawn = Counter(index for epoch in range(epochs) for index in epoch_order(sizes, weights, epoch=epoch, seed=seed))
    first = 0
    for size, weight in files:
        counts = [drawn[index] for index in range(first, first + size)]
        assert sum(counts) == math.floor(weight * size * epochs)
        assert max(counts) - min(counts) <= 1
        assert min(counts) == sum(counts) // size
        first += size
    assert sum(drawn.values()) == sum(math.floor(weight * size * epochs) for size, weight in files)


def test_weights_of_one_change_nothing() -> None:
    order = list(range(7))
    random.Random("3/5").shuffle(order)
    assert epoch_order([7], [Fraction(1)], epoch=5, seed=3) == order
    assert epoch_order([4, 3], [Fraction(1), Fraction(1)], epoch=5, seed=3) == order


def test_passes_and_files_have_own_orders() -> None:
    def halves(epoch: int) -> tuple[list[int], list[int]]:
        order = epoch_order([40, 40], [Fraction("0.5")] * 2, epoch=epoch, seed=1)
        return sorted(i for i in order if i < 40), sorted(i - 40 for i in order if i >= 40)

    assert halves(0)[0] != halves(0)[1]  # the files are cut in different places
    assert halves(0)[0] != halves(2)[0]  # and a later pass in other places than the first
    assert sorted(halves(0)[0] + halves(1)[0]) == list(range(40))
    assert halves(0) == halves(0)
