"""Files of dead runs are removed, and files of live ones stay."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from slime.cluster.life.run_files import RunFiles, remove_stale

HOLDER = """
import sys, time
from slime.cluster.life.run_files import RunFiles
from slime.core.marks import new_mark
files = RunFiles(new_mark())
files.record(sys.argv[1])
print(files.path, flush=True)
time.sleep(600)
"""


def test_leftovers_of_dead_runs_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    session, others = tmp_path / "ray" / "session_1", tmp_path / "ray" / "session_2"
    for directory in (session / "logs", others, tmp_path / "slime-run-not-ours"):
        directory.mkdir(parents=True)
    command = [sys.executable, "-c", HOLDER, str(session)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        dead = Path(process.stdout.readline().strip())
        remove_stale()
        assert dead.is_dir() and session.is_dir(), "its run is alive"
        process.kill()
    files = RunFiles("0" * 16)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"ray", "slime-run-not-ours", files.path.name}
    assert [path.name for path in (tmp_path / "ray").iterdir()] == ["session_2"]
    files.close()
    assert not files.path.exists()
