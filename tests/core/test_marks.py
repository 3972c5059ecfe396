"""A run's processes are found by the mark that they inherit."""

from __future__ import annotations

import subprocess
import sys

import pytest

from slime.core.marks import VARIABLE, marked, new_mark


def test_processes_started_after_the_mark_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "an earlier run")
    wait = [sys.executable, "-S", "-c", "print('up', flush=True); input()"]
    processes: list[subprocess.Popen[bytes]] = []

    def start() -> int:
        process = subprocess.Popen(wait, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        return process.pid

    try:
        before = start()
        mark = new_mark()
        after = {start(), start()}
        assert set(marked(mark)) == after
        assert before in marked("an earlier run")
        assert marked(mark[:-1]) == [], "a part of a mark is another mark"
        assert new_mark() != mark
    finally:
        for process in processes:
            process.communicate(b"\n", timeout=30)
    assert marked(mark) == [], "processes that have ended are not found"
