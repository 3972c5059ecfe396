#!/usr/bin/env python3
"""Find where two runs diverge: compare their --save-debug-train-data and name the first tensor that differs.

    python3 tools/diff_steps.py dumps/a dumps/b                 bit for bit
    python3 tools/diff_steps.py dumps/a dumps/b --rtol 1e-5     for another parallel layout, which sums in another order

The order is that of the computation: the batch's columns, log-probs, advantages, then for each step log-probs, loss,
gradients (from the output layer to the embedding, as the backward pass makes them), weights. The tensors that differ
are printed. Exit code: 0 nothing differs, 1 something differs, 2 the runs cannot be compared (other samples, other
steps, missing files).

An entry differs if |A - B| > atol + rtol x the largest entry of its tensor, in A or B: a gradient is a sum of terms of
both signs, so a small one has the rounding error of large ones. The same holds for the loss, which is compared relative
to the largest loss of a token. Integers are always compared exactly.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from slime.observability.step_files import (
    LOSS,
    PLACES,
    RESPONSE_LENGTHS,
    TOKEN_LOSS,
    TOTAL_LENGTHS,
    Axis,
    Entry,
    Place,
    StepFiles,
)

IDENTITY = (TOTAL_LENGTHS, RESPONSE_LENGTHS, "sample_indices", "group_indices", "tokens")
"""Columns that must be equal in both batches; otherwise nothing else can be compared."""
CHUNK = 2**24
"""The number of entries that are compared at a time."""
MOST_SHOWN = 20
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class CannotCompareError(ValueError):
    """From this point on, the two runs have no corresponding tensors."""


@dataclass(frozen=True)
class Comparison:
    """The comparison of one tensor in A and B."""

    place: str
    entry: Entry
    shape: tuple[int, ...]
    num_differing: int
    largest: float
    """The largest |A - B|."""
    relative: float
    """The norm of A - B over the larger of both norms."""
    first: int | None
    """The index of the first entry that differs in the flat tensor; None if none does."""
    values: tuple[float, float]
    """The values of A and B at that entry."""


def compare(
    place: str, entry: Entry, a: Tensor, b: Tensor, *, rtol: float = 0.0, atol: float = 0.0, scale: float = 0.0
) -> Comparison:
    """Compare one tensor of A and B.

    Args:
        scale: `rtol` is relative to the largest entry, or to `scale` if that is larger.

    Raises:
        CannotCompareError: the shapes are different.
    """
    if a.shape != b.shape:
        raise CannotCompareError(f"{place}: {entry.name} is {list(a.shape)} in A and {list(b.shape)} in B")
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    floating = a.is_floating_point() or b.is_floating_point()
    by_bits = a.dtype == b.dtype and (not floating or rtol == atol == 0)
    limit = atol + rtol * max(scale, largest_of(a), largest_of(b)) if floating and not by_bits else 0.0
    num_differing, largest, first = 0, 0.0, None
    values = (0.0, 0.0)
    squares = torch.zeros(3, dtype=torch.float64)
    for start in range(0, flat_a.numel(), CHUNK):
        part_a, part_b = flat_a[start : start + CHUNK], flat_b[start : start + CHUNK]
        wide_a, wide_b = part_a.double(), part_b.double()
        gap = (wide_a - wide_b).abs()
        gap = torch.where((wide_a == wide_b) | (wide_a.isnan() & wide_b.isnan()), 0.0, gap).nan_to_num(nan=math.inf)
        if by_bits:
            differs = part_a.view(_BITS[a.element_size()]) != part_b.view(_BITS[b.element_size()])
        else:
            differs = gap > limit
        if first is None and differs.any():
            place_in_part = int(differs.nonzero()[0])
            first = start + place_in_part
            values = (float(wide_a[place_in_part]), float(wide_b[place_in_part]))
        num_differing += int(differs.sum())
        largest = max(largest, float(gap.max()))
        squares += torch.stack([each.square().sum() for each in (gap, wide_a, wide_b)])
    difference, norm_a, norm_b = squares.sqrt().tolist()
    relative = 0.0 if difference == 0 else difference / (max(norm_a, norm_b) or 1.0)
    return Comparison(place, entry, tuple(a.shape), num_differing, largest, relative, first, values)


def largest_of(tensor: Tensor) -> float:
    """Return the largest absolute value of the finite entries."""
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


@dataclass(frozen=True)
class Rows:
    """The samples of a rollout, used to name the place of a difference."""

    total_lengths: Tensor
    response_lengths: Tensor
    samples: Tensor
    groups: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, files: StepFiles, place: Place) -> Rows:
        entries = {entry.name: entry for entry in place.tensors}
        missing = [name for name in IDENTITY if name not in entries]
        if missing:
            raise CannotCompareError(f"{place.name}: {', '.join(missing)} are missing")
        return cls(*(files.tensor(entries[name]) for name in IDENTITY))

    def sample(self, row: int) -> str:
        return f"sample {int(self.samples[row])} of group {int(self.groups[row])}"

    def token(self, index: int) -> str:
        """Describe the token at `index` among all tokens."""
        row, number = _row_of(self.total_lengths, index)
        return f"{self.sample(row)}, token {number} of {int(self.total_lengths[row])} (id {int(self.tokens[index])})"

    def response_token(self, index: int) -> str:
        """Describe the token at `index` among all response tokens; numbers count from 0."""
        row, number = _row_of(self.response_lengths, index)
        length = int(self.response_lengths[row])
        token = int(self.tokens[int(self.total_lengths[: row + 1].sum()) - length + number])
        return f"{self.sample(row)}, response token {number} of {length} (id {token})"


def _row_of(lengths: Tensor, index: int) -> tuple[int, int]:
    """Return the row that has the entry `index`, and its position in that row."""
    ends = lengths.cumsum(0)
    row = int(torch.searchsorted(ends, index, right=True))
    return row, index - int(ends[row] - lengths[row])


def check_same_rows(place: str, a: Rows, b: Rows) -> None:
    """Check that both batches have the same samples in the same order.

    Raises:
        CannotCompareError: they have not.
    """
    if len(a.samples) != len(b.samples):
        raise CannotCompareError(f"{place}: A has {len(a.samples)} samples, B has {len(b.samples)}")
    for row in range(len(a.samples)):
        if a.sample(row) != b.sample(row):
            same = sorted(a.samples.tolist()) == sorted(b.samples.tolist())
            what = "the same samples in another order" if same else "other samples"
            raise CannotCompareError(f"{place}: {what}: row {row} is {a.sample(row)} in A, {b.sample(row)} in B")
    ends = a.total_lengths.cumsum(0)
    for row in range(len(a.samples)):
        lengths_a, lengths_b = ((int(each.total_lengths[row]), int(each.response_lengths[row])) for each in (a, b))
        if lengths_a != lengths_b:
            raise CannotCompareError(
                f"{place}: {a.sample(row)} has {lengths_a[0]} tokens in A, {lengths_a[1]} of them response, "
                f"and {lengths_b[0]}, {lengths_b[1]} in B"
            )
        part = slice(int(ends[row]) - lengths_a[0], int(ends[row]))
        if not torch.equal(a.tokens[part], b.tokens[part]):
            number = int((a.tokens[part] != b.tokens[part]).nonzero()[0])
            raise CannotCompareError(f"{place}: {a.sample(row)} has other tokens in B, from token {number} on")


class Walk:
    """Goes through both dumps in parallel, place by place."""

    def __init__(self, a: StepFiles, b: StepFiles, *, rtol: float = 0.0, atol: float = 0.0) -> None:
        self._a, self._b, self._rtol, self._atol = a, b, rtol, atol
        self.rows: dict[int, Rows] = {}
        """The rows of each rollout that has been reached."""

    def comparisons(self) -> Iterator[Comparison]:
        """Yield the comparison of each tensor, in the order of the computation.

        Raises:
            CannotCompareError: from here on the runs have no corresponding tensors.
        """
        if not self._a.places or not self._b.places:
            raise CannotCompareError(f"{'B' if self._a.places else 'A'} has no rollout")
        steps = [_names_by_rollout(files.places) for files in (self._a, self._b)]
        for place_a, place_b in zip_longest(self._a.places, self._b.places):
            if place_a is None:
                raise CannotCompareError(f"A ends before {place_b.name}")
            if place_b is None:
                raise CannotCompareError(f"B ends before {place_a.name}")
            if place_a.rollout_id != place_b.rollout_id:
                raise CannotCompareError(f"A continues with {place_a.name}, B with {place_b.name}")
            rollout_id = place_a.rollout_id
            if rollout_id not in self.rows:
                names_a, names_b = (each.get(rollout_id, []) for each in steps)
                if names_a != names_b:
                    listed = [", ".join(names[1:]) or "nothing" for names in (names_a, names_b)]
                    raise CannotCompareError(f"rollout {rollout_id}: A's steps are {listed[0]}; B's are {listed[1]}")
                self._begin(rollout_id, place_a, place_b)
            yield from self._place(place_a, place_b)

    def _begin(self, rollout_id: int, place_a: Place, place_b: Place) -> None:
        rows_a, rows_b = Rows.of(self._a, place_a), Rows.of(self._b, place_b)
        check_same_rows(place_a.name, rows_a, rows_b)
        self.rows[rollout_id] = rows_a

    def _place(self, place_a: Place, place_b: Place) -> Iterator[Comparison]:
        there = {entry.name: entry for entry in place_b.tensors}
        names_a = {entry.name for entry in place_a.tensors}
        # The first tensor of B that A lacks: all earlier ones are compared first, in both orders.
        lacking = next((entry.name for entry in place_b.tensors if entry.name not in names_a), None)
        token_loss = 0.0
        for entry in place_a.tensors:
            if entry.name not in there:
                raise CannotCompareError(f"{place_a.name}: only A has {entry.name}; the runs' flags differ")
            a, b = self._a.tensor(entry), self._b.tensor(there[entry.name])
            if entry.name == PLACES and not torch.equal(a, b):
                raise CannotCompareError(f"{place_a.name}: the step has other tokens in A than in B")
            scale = token_loss if entry.name == LOSS else 0.0
            yield compare(place_a.name, entry, a, b, rtol=self._rtol, atol=self._atol, scale=scale)
            if entry.name == TOKEN_LOSS:
                token_loss = max(largest_of(a), largest_of(b))
        if lacking is not None:
            raise CannotCompareError(f"{place_a.name}: only B has {lacking}; the runs' flags differ")

    def where(self, found: Comparison) -> str:
        """Describe the first entry that differs: its sample and token, or its index in a weight."""
        assert found.first is not None
        axis, place = found.entry.axis, next(each for each in self._a.places if each.name == found.place)
        index = found.first // math.prod(found.shape[1:])
        rows = self.rows[place.rollout_id]
        if axis is Axis.ENTRY:
            indices = torch.unravel_index(torch.tensor(found.first), found.shape) if found.shape else ()
            return f"entry {[int(each) for each in indices]}" if found.shape else "the number"
        if axis is Axis.SAMPLE:
            return rows.sample(index)
        if axis is Axis.TOKEN:
            return rows.token(index)
        if axis is Axis.STEP:
            index = int(self._a.tensor(next(each for each in place.tensors if each.name == PLACES))[index])
        return rows.response_token(index)


def _names_by_rollout(places: Sequence[Place]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for place in places:
        found.setdefault(place.rollout_id, []).append(place.name)
    return found


def print_table(comparisons: Sequence[Comparison]) -> None:
    """Print plain columns, whatever the terminal's width, because names are long and people search for them."""
    head = ("place", "name", "shape", "max |A - B|", "relative", "differ")
    rows = [
        (
            each.place,
            each.entry.name,
            str(list(each.shape)),
            f"{each.largest:.3g}",
            f"{each.relative:.3g}",
            f"{each.num_differing} of {math.prod(each.shape)}",
        )
        for each in comparisons
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_facts(a: StepFiles, b: StepFiles) -> None:
    for name in dict.fromkeys([*a.facts, *b.facts]):
        if a.facts.get(name) != b.facts.get(name):
            print(f"{name}: {a.facts.get(name)} in A, {b.facts.get(name)} in B")


def diff(a: Path, b: Path, *, rtol: float, atol: float, show_all: bool) -> int:
    """Print the differences and return the exit code."""
    try:
        files = StepFiles(a), StepFiles(b)
    except ValueError as error:
        print(f"cannot compare: {error}", file=sys.stderr)
        return 2
    print(f"A: {a}\nB: {b}")
    _print_facts(*files)
    walk = Walk(*files, rtol=rtol, atol=atol)
    shown: list[Comparison] = []
    num_compared = num_differing = 0
    first: Comparison | None = None
    fault: ValueError | None = None
    try:
        for found in walk.comparisons():
            num_compared += 1
            num_differing += found.first is not None
            first = first or (found if found.first is not None else None)
            if show_all or (found.first is not None and len(shown) < MOST_SHOWN):
                shown.append(found)
    except ValueError as error:
        fault = error
    if shown:
        print_table(shown)
    if not show_all and num_differing > len(shown):
        print(f"... and {num_differing - len(shown)} more that differ (--all shows every tensor)")
    if first is not None:
        print(f"The first of {num_differing} that differ, of {num_compared} tensors: {first.place}: {first.entry.name}")
        print(f"  {walk.where(first)}: {first.values[0]:.9g} in A, {first.values[1]:.9g} in B")
    if fault is not None:
        print(f"cannot compare{' the rest' if num_compared else ''}: {fault}", file=sys.stderr)
    elif first is None:
        print(f"{num_compared} tensors: " + ("equal bit for bit" if rtol == atol == 0 else "within the tolerance"))
    return 1 if first is not None else 2 if fault is not None else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument("--rtol", type=float, default=0.0, help="relative to the largest entry of a tensor")
    parser.add_argument("--atol", type=float, default=0.0)
    parser.add_argument("--all", action="store_true", help="print every tensor, including equal ones")
    args = parser.parse_args(argv)
    return diff(args.a, args.b, rtol=args.rtol, atol=args.atol, show_all=args.all)


if __name__ == "__main__":
    sys.exit(main())
