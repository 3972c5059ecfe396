"""`python -m tests.inputs --lines 2400 --seed 0`: no command line ends in a traceback, a hang or silence.

Each line is a valid one with hostile values, files and hooks in it (see `lines`). A line that fails is named by its
seed: `--only SEED` runs it again and prints it.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests.inputs.lines import HostileLines, outcome

MEMORY = 8 * 2**30
"""Bytes of address space: a line that needs more ends in a MemoryError."""


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m tests.inputs", description="Hostile command lines.")
    flags.add_argument("--lines", type=int, default=2400)
    flags.add_argument("--seed", type=int, default=0, help="of the first line; the others count up from it")
    flags.add_argument("--only", type=int, nargs="+", metavar="SEED", help="these lines, printed")
    return flags


def main(argv: Sequence[str]) -> int:
    """Try the lines; return 0 if every one ended in a plan or a message."""
    options = parser().parse_args(argv)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    seeds: Sequence[int] = options.only or range(options.seed, options.seed + options.lines)
    kinds: Counter[str] = Counter()
    slowest = (0.0, 0)
    bad: dict[str, list[int]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        lines = HostileLines(Path(folder))
        for seed in seeds:
            words = lines.line(seed)
            end = outcome(words)
            kinds[end.kind] += 1
            slowest = max(slowest, (end.seconds, seed))
            if options.only:
                print([word[:300] for word in words], end.kind, f"{end.seconds:.2f} s", ascii(end.text), sep="\n")
            if not end.good:
                bad[end.text.strip().splitlines()[-1][:200] if end.kind == "traceback" else end.kind].append(seed)
                last = end.text.strip().splitlines()[-1][:160] if end.text.strip() else ""
                print(f"seed {seed}: {end.kind} after {end.seconds:.1f} s: {last!a}", flush=True)
    for text, where in sorted(bad.items(), key=lambda item: -len(item[1])):
        print(f"{len(where):5} {text!a}: seeds {where[:5]}")
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    print(f"{sum(kinds.values())} lines: {counts}; the slowest took {slowest[0]:.2f} s (seed {slowest[1]})")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
