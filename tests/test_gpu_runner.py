"""The runner of the GPU checks, on checks that need no GPU: however a check ends, it has a row."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.gpu import checks

ROOT = Path(__file__).parent.parent
MODULES = ("tests.no_such_module", "tests.gpu_checks_for_tests")
START = f"import sys; from tests.gpu.runner import main; sys.exit(main(sys.argv[1:], {MODULES!r}))"


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START, "--out", str(out), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rows(out: Path) -> dict[str, list[tuple[str, str, str]]]:
    found: dict[str, list[tuple[str, str, str]]] = {}
    for row in json.loads((out / "results.json").read_text())["rows"]:
        if row["what"] != "whole check":
            found.setdefault(row["check"].split(".")[-1], []).append((row["what"], row["value"], row["state"]))
    return found


def test_every_end_of_a_check_is_a_row(tmp_path: Path) -> None:
    runner = start(tmp_path, "--minutes", "500")
    printed, _ = runner.communicate(timeout=120)
    assert runner.returncode == 1
    found = rows(tmp_path)
    assert found["passes"] == [("difference", "0", "ok"), ("speed", "123,456", "figure")]
    assert found["misses"] == [("difference", "0.5", "FAILED")]
    assert found["raises"][0] == ("before", "1", "figure")
    assert found["raises"][1][0] == "exception"
    assert found["raises"][1][1].startswith("RuntimeError: the reason at gpu_checks_for_tests.py:")
    assert found["crashes"] == [("process", f"exit code -{signal.SIGABRT}", "FAILED")]
    (child,), (_, ended, state) = [pid for what, pid, _ in found["hangs"] if what == "child"], found["hangs"][-1]
    assert "not done after" in ended
    assert state == "FAILED"
    assert not psutil.pid_exists(int(child))
    assert "hangs" in (tmp_path / "gpu_checks_for_tests.hangs.log").read_text()  # where it hung
    assert found["says_why_not"] == [("no such library", "", "skipped")]
    assert found["needs_many"] == [("needs 99 GPUs", "0 here", "skipped")]
    assert found["takes_long"][0][2] == "not run"
    assert found["no_such_module"] == [("no module tests.no_such_module", "", "missing")]
    assert "RuntimeError: the reason" in printed  # the end of the log
    assert printed.rstrip().endswith("2 skipped, 1 missing, 1 not run")


def test_a_runner_that_gets_sigterm_prints_its_table(tmp_path: Path) -> None:
    runner = start(tmp_path, "passes", "needs_many", "takes_long")
    deadline = time.monotonic() + 60
    log = tmp_path / "gpu_checks_for_tests.takes_long.log"
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    runner.send_signal(signal.SIGTERM)
    printed, _ = runner.communicate(timeout=60)
    assert runner.returncode == 1
    assert rows(tmp_path)["passes"][0] == ("difference", "0", "ok")
    assert rows(tmp_path)["takes_long"] == [("process", "the runner was ended", "FAILED")]
    assert "the runner was ended" in printed


def test_names_that_no_check_has(tmp_path: Path) -> None:
    runner = start(tmp_path, "paritty", "--list")
    printed, _ = runner.communicate(timeout=60)
    assert runner.returncode == 2
    assert "no check or module is called paritty" in printed


def test_every_module_is_there_and_documented() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    for module in checks.MODULES:
        assert (ROOT / "tests" / "gpu" / f"{module}.py").is_file()
        assert f"\n| `{module}` |" in page


def imported(path: Path) -> set[str]:
    """Return the modules that a file imports, also within its functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_checks_import_test_modules_from_the_root() -> None:
    folders = [path for path in (ROOT / "tests").iterdir() if path.is_dir()]
    bare = {path.stem for folder in (ROOT / "tests", *folders) for path in folder.glob("*.py")} - {"__init__"}
    waiting, seen = sorted((ROOT / "tests" / "gpu").glob("*.py")), set[Path]()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        names = imported(path)
        # pytest adds the folders of tests to sys.path; `python -m tests.gpu` finds only what begins with `tests.`
        assert not names & bare, path
        files = [(ROOT / name.replace(".", "/")).with_suffix(".py") for name in names if name.startswith("tests.")]
        waiting += [file for file in files if file.is_file() and file not in seen]
    assert ROOT / "tests" / "forked_engine.py" in seen
