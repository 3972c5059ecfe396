"""Verdicts on pairs of an answer and a label with known truth, and a table of the wrong verdicts.

`python tests/rollout/verdicts_for_tests.py [FILE]` prints the misses by kind. A file has four columns, separated by
tabs: truth (1 equal, 0 not), kind, answer, label. Its first line names them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT = Path(__file__).with_name("heldout_answers.tsv")
"""Pairs that were not used to write any rule of the graders."""


@dataclass(frozen=True)
class Pair:
    """An answer and a label, and whether a mathematician finds them equal."""

    equal: bool
    kind: str
    answer: str
    label: str


def read_pairs(path: Path) -> list[Pair]:
    """Read the pairs of one file, in its order."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return [Pair(truth == "1", kind, answer, label) for truth, kind, answer, label in rows]


def misses(pairs: Iterable[Pair], verdict: Callable[[str, str], bool]) -> Iterator[Pair]:
    """Yield the pairs on which `verdict(answer, label)` is not the truth."""
    return (pair for pair in pairs if verdict(pair.answer, pair.label) != pair.equal)


def report(pairs: list[Pair], missed: list[Pair]) -> str:
    """Write a line for each miss and for each kind, and the two totals at the end."""
    lines = [
        f"{'refused' if pair.equal else 'ACCEPTED'}\t{pair.kind}\t{pair.answer}\t{pair.label}"
        for pair in sorted(missed, key=lambda pair: (pair.kind, pair.equal))
    ]
    counts = Counter((pair.kind, pair.equal) for pair in missed)
    of = Counter((pair.kind, pair.equal) for pair in pairs)
    for kind in sorted({pair.kind for pair in missed}):
        accepted = f"{counts[kind, False]} of {of[kind, False]} wrong accepted"
        lines.append(f"{kind}: {accepted}, {counts[kind, True]} of {of[kind, True]} right refused")
    wrong = sum(not pair.equal for pair in missed)
    lines.append(f"in all {len(pairs)} pairs: {wrong} wrong accepted, {len(missed) - wrong} right refused")
    return "\n".join(lines)


def main() -> None:
    from slime.rollout.rewards.mathematics import equal_as_mathematics

    pairs = read_pairs(Path(sys.argv[1]) if len(sys.argv) > 1 else HELD_OUT)
    print(report(pairs, list(misses(pairs, equal_as_mathematics))))


if __name__ == "__main__":
    main()
