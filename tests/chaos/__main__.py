"""`python -m tests.chaos --seed 1 --out outputs/chaos`: see tests/chaos/chaos.py."""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.chaos import EVERY, NUM_ROLLOUTS, ChaosRun, Start, compared, make_start, nobodys, shared_memory
from tests.chaos.rewards import FAILING

SAMPLES = 32 * 8
"""The number of samples in one rollout of the demo's run."""

Row = tuple[str, str, bool]


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m tests.chaos", description="A run among faults, and one without.")
    flags.add_argument("--seed", type=int, default=1, help="of the runs, and of the faults")
    flags.add_argument("--out", type=Path, default=Path("outputs/chaos"))
    flags.add_argument("--start", type=Path, help="a demo's directory, to take its supervised start from")
    return flags


def main(argv: Sequence[str]) -> int:
    """Run the comparison; return 0 if every row of the table is right."""
    options = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    out: Path = options.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    begin = time.monotonic()
    start = make_start(out / "start", options.seed) if options.start is None else Start.under(options.start.resolve())
    undisturbed = ChaosRun(out / "undisturbed", start, options.seed, None)
    disturbed = ChaosRun(out / "disturbed", start, options.seed, random.Random(options.seed))
    rows: list[Row] = []
    for run in (undisturbed, disturbed):
        try:
            rows += ended(run)
        finally:
            run.end()
            shutil.rmtree(run.temporary, ignore_errors=True)
    if undisturbed.evaluations() and disturbed.evaluations():
        rows += [*troubles(disturbed), *compared(undisturbed, disturbed)]
    return tell(out, disturbed, rows, time.monotonic() - begin)


def ended(run: ChaosRun) -> list[Row]:
    """Return rows about the end of the run: its exit code, and what it left."""
    begin, before, name = time.monotonic(), shared_memory(), run.directory.name
    try:
        code = run.run()
    except TimeoutError as error:
        return [(f"{name}: ends", str(error), False)]
    seconds = time.monotonic() - begin
    processes, files, memory = run.left_over(), run.files_left(), nobodys(shared_memory() - before)
    ending = f"{seconds:.0f} s, {run.rollouts()} rollouts" if code == 0 else run.last_line
    return [
        (f"{name}: ends", ending, code == 0 and run.rollouts() == NUM_ROLLOUTS),
        (f"{name}: processes left over", "; ".join(processes) or "none", not processes),
        (f"{name}: temporary files left over", " ".join(files) or "none", not files),
        (f"{name}: shared memory left over", " ".join(memory) or "none", not memory),
    ]


def troubles(run: ChaosRun) -> list[Row]:
    """Return rows that show that the faults have happened."""
    failed = run.failed_rewards()
    share = sum(failed.values()) / (NUM_ROLLOUTS * SAMPLES)
    reasons = ", ".join(f"{count:.0f} {reason}" for reason, count in sorted(failed.items()))
    kinds = {fault.kind for fault in run.faults}
    engines = ", ".join(f"{fault.kind} in rollout {fault.rollout}" for fault in run.faults)
    return [
        ("engines", engines or "none was hit", len(run.faults) >= NUM_ROLLOUTS // EVERY - 1 and len(kinds) == 2),
        ("rewards failed", f"{share:.1%}: {reasons}", FAILING / 2 < share < FAILING * 2 and len(failed) >= 3),
    ]


def tell(out: Path, run: ChaosRun, rows: Sequence[Row], seconds: float) -> int:
    """Print the table and the verdict; return the exit code."""
    width = max(len(what) for what, _, _ in rows)
    lines = [f"{what.ljust(width)}  {'ok    ' if right else 'FAILED'}  {figure}" for what, figure, right in rows]
    wrong = sum(not right for _, _, right in rows)
    lines.append(f"\n{len(rows) - wrong} of {len(rows)} right; {seconds / 60:.1f} min")
    (out / "table.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
