"""Reaper: a driver that was killed leaves no child, one that lives on keeps its children."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = """
import subprocess, sys
from pathlib import Path
from slime.cluster.life.reaper import Reaper
from slime.cluster.life.run_files import RunFiles
from slime.core.marks import new_mark

mark = new_mark()
files = RunFiles(mark)
child = subprocess.Popen(["sleep", "86397"])
reaper = Reaper(mark, files, Path(sys.argv[1]))
if sys.argv[2] == "lives on":
    reaper.leave(None, None, None)
else:
    reaper.finish()
print(child.poll())
child.kill()
"""


@pytest.mark.parametrize(("driver", "ended"), [("dies", "-9"), ("lives on", "None")])
def test_children_end_with_the_driver_alone(tmp_path: Path, driver: str, ended: str) -> None:
    """The kernel closes the pipe of a dying driver before it gives its children to another parent.

    For as long as that takes they still look like the children of a driver that lives.
    """
    command = [sys.executable, "-c", DRIVER, str(tmp_path), driver]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip() == ended
