"""Run the GPU checks, each in processes of its own, and print one table: `make test-gpu`.

    python -m tests.gpu                        every check that this machine has GPUs enough for
    python -m tests.gpu parity engine.starts   a module's checks, or one check
    python -m tests.gpu --list                 their names, and what they need

Below --out (outputs/gpu): rows.jsonl as the rows come, <check>.log for each; results.json and table.txt at the end.

Invariant: the table is printed however the run ends (also after SIGTERM), every check has a row in it, and no process
that a check started outlives it: the runner adopts orphans and ends them by their id.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import psutil

from tests.gpu.checks import (
    FAILED,
    FIGURE,
    MISSING,
    MODULES,
    NOT_RUN,
    OK,
    SKIPPED,
    Needs,
    Report,
    Row,
    SkipCheck,
    append,
)

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "outputs" / "gpu"
TAIL_LINES = 15
TABLE_WIDTHS = {"check": 28, "what": 64, "value": 40, "limit": 40}
DISTRIBUTIONS = (
    *("torch", "triton", "sglang", "sglang-kernel", "flashinfer-python"),
    *("megatron-core", "ray", "transformers", "sglang-router"),
)
PR_SET_CHILD_SUBREAPER = 36
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "HF_HUB_OFFLINE": "1"}
POLL = 0.2
WHOLE = "whole check"
SECONDS_TO_END = 10.0
"""Seconds between SIGTERM and SIGKILL for a check's processes."""


class Ended(BaseException):
    """The runner itself has got a signal to end."""


@dataclass(frozen=True)
class Planned:
    """A check that was found, or the fault of its module in its place."""

    name: str
    needs: Needs
    module: str = ""
    function: str = ""
    what: str = ""
    problem: tuple[str, str] | None = None
    """The state and text of a row that replaces it."""


def dotted(module: str) -> str:
    return module if "." in module else f"tests.gpu.{module}"


def collect(modules: Sequence[str]) -> list[Planned]:
    """Return the checks of each module in their order; a module without any is one row."""
    found: list[Planned] = []
    for short in modules:
        name = dotted(short)
        try:
            if importlib.util.find_spec(name) is None:
                found.append(Planned(short, Needs(0, 0), problem=(MISSING, f"no module {name}")))
                continue
            module = importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - whatever a module raises is its row, and the others go on
            problem = (FAILED, f"import of {name}: {where(error)}")
            found.append(Planned(short, Needs(0, 0), problem=problem))
            continue
        for key, function in vars(module).items():
            needs = getattr(function, "needs", None)
            if isinstance(needs, Needs) and function.__module__ == name:
                what = (inspect.getdoc(function) or "").split("\n")[0]
                found.append(Planned(f"{short.split('.')[-1]}.{key}", needs, name, key, what))
    return found


def chosen(found: Sequence[Planned], names: Sequence[str]) -> list[Planned]:
    """Return the named checks: "parity" is every check of a module, "parity.logits" or "logits" is one."""
    if not names:
        return list(found)
    kept = [one for one in found if {one.name, *one.name.split(".", 1)} & set(names)]
    known = {part for one in found for part in (one.name, *one.name.split(".", 1))}
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(f"no check or module is called {', '.join(unknown)}: see --list")
    return kept


def where(error: BaseException) -> str:
    """Return an exception as one line: its type, its text, and the frame of our code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(str(ROOT))] or list(frames)
    place = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{place}"


def run_one(module: str, function: str, name: str, rows: Path, minutes: float) -> int:
    """Run a check in this child process. Shortly before its limit, the stacks of all threads go to the log."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(minutes * 60 - 5.0, minutes * 30), exit=False)
    report = Report(name, rows)
    try:
        getattr(importlib.import_module(module), function)(report)
    except SkipCheck as reason:
        report.skipped(str(reason))
        return 0
    except Exception as error:  # noqa: BLE001 - it becomes a row
        traceback.print_exc()
        report.fail("exception", where(error))
        return 1
    finally:
        faulthandler.cancel_dump_traceback_later()
    return int(report.failed)


class Runner:
    """Runs checks one after the other and keeps their rows on disk."""

    def __init__(self, out: Path, *, num_gpus: int, minutes: float | None) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.rows_path = out / "rows.jsonl"
        self.rows_path.write_bytes(b"")
        self.num_gpus = num_gpus
        self.deadline = None if minutes is None else time.monotonic() + minutes * 60
        self.process: subprocess.Popen[bytes] | None = None
        self.running = ""

    def rows(self) -> list[Row]:
        """Return the rows on disk; a line that a kill has cut off is left out."""
        lines = self.rows_path.read_bytes().split(b"\n")[:-1]
        return [Row(**json.loads(line)) for line in lines]

    def add(self, check: str, what: str, value: str, state: str, *, limit: str = "", seconds: float = 0.0) -> None:
        append(self.rows_path, Row(check=check, what=what, value=value, limit=limit, state=state, seconds=seconds))

    def run(self, planned: Sequence[Planned]) -> None:
        for one in planned:
            left = None if self.deadline is None else (self.deadline - time.monotonic()) / 60
            if one.problem is not None:
                self.add(one.name, one.problem[1], "", one.problem[0])
            elif one.needs.gpus > self.num_gpus:
                self.add(one.name, f"needs {gpus(one.needs.gpus)}", f"{self.num_gpus} here", SKIPPED)
            elif left is not None and one.needs.minutes > left:
                self.add(one.name, "time", f"{left:.1f} min left", NOT_RUN, limit=f"{one.needs.minutes:g} min")
            else:
                self.run_check(one)

    def run_check(self, one: Planned) -> None:
        """Run a check in a process group of its own and wait for its end, or end it at its limit."""
        log = self.out / f"{one.name}.log"
        print(f"== {one.name} ({gpus(one.needs.gpus)}, at most {one.needs.minutes:g} min): {one.what}", flush=True)
        self.running = one.name
        start, earlier = time.monotonic(), len(self.rows())
        arguments = [one.module, one.function, one.name, str(self.rows_path), str(one.needs.minutes)]
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": python_path()}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.gpu", "--one", *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
            try:
                code = wait(self.process, one.needs.minutes * 60)
                problem = "" if code == 0 else f"exit code {code}"
            except subprocess.TimeoutExpired:
                problem = f"not done after {one.needs.minutes:g} min: ended"
        end_everything(self.process.pid)
        self.process = None
        seconds = round(time.monotonic() - start, 1)
        failed = any(row.state == FAILED for row in self.rows()[earlier:])
        if problem and not (failed and problem == "exit code 1"):
            self.add(one.name, "process", problem, FAILED, seconds=seconds)
            failed = True
        if failed:
            print("\n".join(f"   | {line}" for line in tail(log)), flush=True)
        self.running = ""
        self.add(one.name, WHOLE, f"{seconds:.0f} s", FIGURE, seconds=seconds)
        print(f"== {one.name}: {'FAILED' if failed else 'ok'} after {seconds:.0f} s{memory_in_use()}", flush=True)

    def end(self, planned: Sequence[Planned]) -> None:
        """End early: add rows for the check that runs and for those that never ran."""
        if self.process is not None:
            end_everything(self.process.pid)
        seen = {row.check for row in self.rows()}
        for one in planned:
            if one.name == self.running:
                self.add(one.name, "process", "the runner was ended", FAILED)
            elif one.name not in seen:
                self.add(one.name, "the runner was ended", "", NOT_RUN)


def python_path() -> str:
    earlier = os.environ.get("PYTHONPATH")
    return str(ROOT) if not earlier else f"{ROOT}{os.pathsep}{earlier}"


def gpus(count: int) -> str:
    return f"{count} GPU" if count == 1 else f"{count} GPUs"


def tail(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-TAIL_LINES:]


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends (on Linux), so that none is lost."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def wait(process: subprocess.Popen[bytes], seconds: float) -> int:
    """Wait for the process, and return its exit code; reap orphans meanwhile, because a check may wait for them.

    Raises:
        TimeoutExpired: it still runs after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return process.wait(timeout=POLL)
        except subprocess.TimeoutExpired:
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if ended.si_pid == process.pid:
                    break
                os.waitpid(ended.si_pid, 0)
            if time.monotonic() > deadline:
                raise


def end_everything(group: int) -> None:
    """End the check's process group and its orphans: every descendant of the runner, by id."""
    own = psutil.Process()
    left = own.children(recursive=True)
    if [process for process in left if process.pid != group]:
        print(f"   left running at the end: {', '.join(sorted(map(described, left)))[:300]}", flush=True)
    for process in left:
        signal_quietly(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(left, timeout=SECONDS_TO_END if left else 0)
    for process in {*alive, *own.children(recursive=True)}:
        signal_quietly(process, signal.SIGKILL)
    psutil.wait_procs(own.children(recursive=True), timeout=SECONDS_TO_END)


def described(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return "?"


def signal_quietly(process: psutil.Process, number: int) -> None:
    """Send a signal to a process that may have ended by itself."""
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def nvidia_smi(query: str) -> list[str]:
    """Return one line for each GPU; none if there is no driver."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def count_gpus() -> int:
    """Return the number of GPUs that a child process would see; from NVML, so that the runner has no CUDA context."""
    import torch

    return torch.cuda.device_count()


def memory_in_use() -> str:
    """Return the memory that is in use on the GPUs after a check, for the log."""
    used = nvidia_smi("memory.used")
    return f" (GPU memory in use now: {', '.join(used)} MiB)" if used else ""


def versions() -> list[str]:
    """Return the versions of hardware and software with which the figures were measured."""
    import torch

    lines = [f"Python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPUs"]
    for name in DISTRIBUTIONS:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} not installed")
    lines.append(f"CUDA {torch.version.cuda or 'none'}")
    cards = nvidia_smi("name,memory.total,driver_version")
    lines += [f"GPU {index}: {card} (name, MiB, driver)" for index, card in enumerate(cards)] or ["no GPU"]
    return lines


def table(rows: Sequence[Row]) -> str:
    """Return the table with one line for each row; a cell longer than its column is cut (rows.jsonl has all of it)."""
    cells = [("check", "what", "value", "limit", "")]
    cells += [(row.check, row.what, row.value, row.limit, row.state) for row in rows]
    widths = [min(max(len(line[i]) for line in cells), most) for i, most in enumerate(TABLE_WIDTHS.values())]
    lines: list[str] = []
    for *line, state in cells:
        shown = [
            cell if len(cell) <= width else cell[: width - 1] + "…" for cell, width in zip(line, widths, strict=True)
        ]
        lines.append("  ".join([*(cell.ljust(width) for cell, width in zip(shown, widths, strict=True)), state]))
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    states = [row.state for row in rows]
    return ", ".join(f"{states.count(state)} {state}" for state in (OK, FAILED, SKIPPED, MISSING, NOT_RUN))


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m tests.gpu", description="Run the checks that need GPUs.")
    flags.add_argument("names", nargs="*", help="modules or checks; all where none is named")
    flags.add_argument("--list", action="store_true", help="print the checks and stop")
    flags.add_argument("--json", type=Path, help="a second place for the results, next to --out")
    flags.add_argument("--out", type=Path, default=OUT, help="folder of the logs and rows.jsonl")
    flags.add_argument("--minutes", type=float, help="start no check that might not fit into what is left of these")
    return flags


def main(argv: Sequence[str], modules: Sequence[str] = MODULES) -> int:
    """Run the checks that the command line names; return 1 if a row failed."""
    if argv and argv[0] == "--one":
        module, function, name, rows, minutes = argv[1:]
        return run_one(module, function, name, Path(rows), float(minutes))
    flags = parser()
    options = flags.parse_args(argv)
    try:
        planned = chosen(collect(modules), options.names)
    except ValueError as error:
        flags.error(str(error))
    if options.list:
        for one in planned:
            text = one.problem[1] if one.problem else one.what
            print(f"{one.name:36} {gpus(one.needs.gpus):7} {one.needs.minutes:4g} min  {text}")
        return 0
    out = options.out.resolve()
    runner = Runner(out, num_gpus=count_gpus(), minutes=options.minutes)
    adopt_orphans()
    try:
        signal.signal(signal.SIGTERM, ended)
        runner.run(planned)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the table is next, whatever happens
    except (Ended, KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        runner.end(planned)
    return tell(runner.rows(), out, options.json)


def tell(rows: Sequence[Row], out: Path, also: Path | None) -> int:
    """Print versions, table and failures, and write them into files; return 1 if a row failed."""
    lines = versions()
    results = json.dumps({"versions": lines, "rows": [asdict(row) for row in rows]}, indent=1)
    for path in filter(None, (out / "results.json", also)):
        path.write_text(results + "\n")
    failed = [f"FAILED {row.check}: {row.what}: {row.value} ({row.limit})" for row in rows if row.state == FAILED]
    text = "\n".join(["", *lines, "", table(rows), "", *failed, summary(rows)])
    (out / "table.txt").write_text(text + "\n")
    print(text, flush=True)
    return int(bool(failed))


def ended(number: int, frame: FrameType | None) -> None:
    raise Ended
