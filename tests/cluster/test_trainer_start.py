"""Modules that a program and a trainer load when they start, and modules that they do not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slime.config.resolve import cuda_available
from tests.cluster.runs import ROOT, Task, flags

PLAN = """
import sys
from slime.cluster.main import run
{first}
run(lambda cluster: None, sys.argv[1:])
print(sorted({{"megatron", "ray", "torch", "transformers"}} & set(sys.modules)))
"""


@pytest.mark.skipif(cuda_available(), reason="torch counts the GPUs that there are")
@pytest.mark.parametrize(("first", "loaded"), [("", []), ("import torch", ["torch"])], ids=["plan", "control"])
def test_a_plan_without_gpus_loads_no_heavy_package(task: Task, tmp_path: Path, first: str, loaded: list[str]) -> None:
    words = flags(task, tmp_path / "run", "--dry-run")
    command = [sys.executable, "-c", PLAN.format(first=first), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(loaded)
    assert "tokens in a prompt: median " in done.stdout
    assert "first prompt: " in done.stdout
