"""`python -m tests.kill --kills 45 --seed 0 --out outputs/kill`: see tests/kill/sweep.py."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.cluster.runs import ROOT, make_task
from tests.kill import life as phases
from tests.kill.life import Life
from tests.kill.one_run import RUN_LIMIT_S, Run
from tests.kill.sweep import (
    DRIVER,
    SAVE,
    Kill,
    Outcome,
    broken,
    clear,
    command,
    draw,
    move_cursor,
    table,
    write_results,
)

CONTROL = "control"


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m tests.kill", description="Kill a run at random points of its life.")
    flags.add_argument("--kills", type=int, default=45)
    flags.add_argument("--only", type=int, nargs="*", help="of these kills, those with these numbers")
    flags.add_argument("--seed", type=int, default=0, help="decides victims and moments")
    flags.add_argument("--jobs", type=int, default=1, help="runs side by side")
    flags.add_argument("--out", type=Path, default=Path("outputs/kill"))
    flags.add_argument("--program", default="train.py", help="or train_async.py")
    flags.add_argument("--limit", type=float, default=RUN_LIMIT_S, help="seconds that one run may take")
    flags.add_argument("--extra", default="", help="more flags for every run, in one word")
    return flags


def main(argv: Sequence[str]) -> int:
    """Run the sweep; return 0 if all resumed runs ended like the unbroken one, and the control did not."""
    options = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    out: Path = options.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    task = make_task(out / "tiny")
    runs: list[Run] = []

    def new_run(name: str) -> Run:
        words = [sys.executable, str(ROOT / options.program), *command(task, out / name / SAVE), *options.extra.split()]
        runs.append(Run(out / name, words, limit=options.limit))
        return runs[-1]

    begin = time.monotonic()
    unbroken = new_run("unbroken")
    life = Life(unbroken.start("--max-restarts", "0"), unbroken.directory / SAVE)
    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            while not unbroken.ended:
                life.look()
                time.sleep(phases.POLL_S)
            if unbroken.wait() != 0:
                print(unbroken.log[-4000:])
                return 1
            spans = ", ".join(f"{span.phase} {span.end - span.start:.2f}" for span in [*life.spans, *life.writes])
            print(f"unbroken run: {life.seconds:.0f} s: {spans}", flush=True)
            kills = draw(options.kills, options.seed, [*life.spans, *life.writes])
            numbers = range(len(kills)) if options.only is None else options.only
            control = Kill(DRIVER, 0, phases.SYNC, 1, share=0.5, span_seconds=0.0, restarts=False)

            def one(name: str, kill: Kill) -> Outcome:
                run = new_run(name)
                outcome = broken(run, kill, unbroken.directory / SAVE, move_cursor if name == CONTROL else None)
                clear(run, outcome)
                print(table([outcome]).splitlines()[2], flush=True)
                return outcome

            waiting = [pool.submit(one, f"kill-{number:02}", kills[number]) for number in numbers]
            waiting.append(pool.submit(one, CONTROL, control))
            *outcomes, controlled = [each.result() for each in waiting]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for run in runs:
                run.end()
    return tell(out, outcomes, controlled, time.monotonic() - begin)


def tell(out: Path, outcomes: Sequence[Outcome], control: Outcome, seconds: float) -> int:
    """Print the table and the verdict; return the exit code."""
    write_results(out / "results.json", [*outcomes, control])
    equal = sum(one.equal for one in outcomes)
    noticed = control.problem is None and bool(control.differences)
    wanted = (phases.WRITE, phases.SYNC)
    hit = {phase for phase in wanted if any(one.hit.startswith(phase) for one in outcomes)}
    text = f"{table([*outcomes, control])}\n\n{equal} of {len(outcomes)} ended as the unbroken run; "
    text += f"the control (cursor moved by one) {'differs, as it has to' if noticed else 'WAS NOT NOTICED'}; "
    text += f"in the middle of: {', '.join(sorted(hit)) or 'neither a write nor a weight sync'}; {seconds / 60:.1f} min"
    (out / "table.txt").write_text(text + "\n")
    print("\n" + text, flush=True)
    return int(equal < len(outcomes) or not noticed or len(hit) < 2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
