"""OutputLog and labelled streams: whole lines, masked, bounded, each with what it is about."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest

from slime.core.about import LabelledStream, about
from slime.core.masking import MaskedStream, Masker
from slime.observability.output_log import BURST, MARK, OutputLog

SECRET = "sk-very-secret-1"


def written(path: Path, *parts: bytes) -> str:
    log = OutputLog(path, Masker([SECRET]))
    for part in parts:
        os.write(log.end, part)
    log.close_end()
    log.join(10)
    return path.read_text()


def test_lines_are_masked_and_marked(tmp_path: Path) -> None:
    mark = MARK + b"sample 17\n"
    text = written(
        tmp_path / "sub" / "log",
        b"before\nin pa",
        b"rts\nno end",
        mark,
        b"key sk-very-secret-1 \xff\n",
        MARK + b"\n",
        b"z",
    )
    assert text == "before\nin parts\nno end\nsample 17: key *** \N{REPLACEMENT CHARACTER}\nz\n"


def test_a_flood_is_bounded_and_counted(tmp_path: Path) -> None:
    """300,000 lines, of which the first mebibyte is kept; control: as many bytes as fit are all kept."""
    start = time.process_time()
    line = b"x" * 99 + b"\n"
    text = written(tmp_path / "flood", *[line * 1000] * 300, b"the end\n")
    assert time.process_time() - start < 10
    assert BURST - 200 < (tmp_path / "flood").stat().st_size < BURST + 20_000
    kept = text.count("x\n")
    left_out = sum(int(found.split()[0][1:].replace(",", "")) for found in text.splitlines() if found.startswith("("))
    assert kept + left_out + ("the end" in text) == 300_001
    assert written(tmp_path / "fits", line * 10_000).count("\n") == 10_000


def test_a_line_without_end_is_cut(tmp_path: Path) -> None:
    assert len(written(tmp_path / "long", *[b"y" * 50_000] * 3).splitlines()) > 1


def test_tasks_do_not_mix_their_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", cast(Any, MaskedStream(cast(Any, LabelledStream(out)), Masker([SECRET]))))

    async def work(number: int) -> None:
        with about(f"sample {number}"):
            print("a", number, end="")
            await asyncio.sleep(0)
            print("b", SECRET)
            await asyncio.to_thread(print, "from a thread")
            print("no end", end="")

    async def main() -> None:
        await asyncio.gather(work(1), work(2))

    asyncio.run(main())
    print("nobody")
    lines = out.getvalue().splitlines()
    for number in (1, 2):
        mine = [line for line in lines if line.startswith(f"sample {number}: ")]
        assert mine == [f"sample {number}: {text}" for text in (f"a {number}b ***", "from a thread", "no end")]
    assert lines[-1] == "nobody"


OWN = """
import os, subprocess, sys, logging
from pathlib import Path
from slime.core.about import about
from slime.core.masking import Masker
from slime.observability.logs import log_to_file
from slime.observability.output_log import log_own_output
masker = Masker(["sk-very-secret-1"])
log_own_output(log_to_file(Path(sys.argv[1]), "rollout", masker), masker)
print("printed sk-very-secret-1")
subprocess.run(["sh", "-c", "echo from a child sk-very-secret-1"])
os.write(2, b"native\\n")
with about("sample 3"):
    print("labelled")
    logging.getLogger("mine").info("logged")
import time; time.sleep(0.3)
os.abort()
"""


def test_a_process_logs_its_own_output(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", OWN, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode < 0
    assert done.stdout == done.stderr == ""
    text = (tmp_path / "rollout.log").read_text()
    for line in (
        "printed ***",
        "from a child ***",
        "native",
        "sample 3: labelled",
        "mine: sample 3: logged",
        "Aborted",
    ):
        assert line in text, line
    assert SECRET not in text
