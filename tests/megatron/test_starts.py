"""The start of a trainer: it loads no tracker and no compiler, and importing slime changes nothing in Megatron."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from starts_for_tests import TRACKERS

from slime.megatron.compat import hidden_trackers

PROGRAM = Path(__file__).with_name("starts_for_tests.py")


@pytest.fixture(scope="module")
def starts() -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", str(PROGRAM)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_trainers_start_loads_no_tracker(starts: dict[str, Any]) -> None:
    assert TRACKERS == hidden_trackers.TRACKERS
    assert starts["trainer"]["trackers"] == []
    assert starts["after a tracker"]["trackers"] == ["torch.utils.tensorboard"], "one that is imported before stays"
    assert starts["megatron-core first"]["trackers"] == list(TRACKERS), "control"


def test_a_hook_can_use_trackers(starts: dict[str, Any]) -> None:
    assert starts["trainer"]["used"] == [8, "teardown", "SummaryWriter"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="where CUDA is, they are compiled")
def test_fused_functions_are_uncompiled(starts: dict[str, Any]) -> None:
    """On a CPU they are as they were written, and torch's compiler is not loaded for them."""
    found = {start: (facts["plain function"], facts["compiler"]) for start, facts in starts.items()}
    assert found["trainer"] == found["after a tracker"] == (True, False)
    assert found["megatron-core first"] == (False, True), "control"


def test_importing_slime_changes_nothing_in_megatron(starts: dict[str, Any]) -> None:
    assert starts["trainer"]["patches"] == [[False, 0], [True, 1]], "before, and after two installations"


def test_modules_are_hidden_only_inside_the_block() -> None:
    sys.modules.pop("cProfile", None)
    with hidden_trackers.hidden("cProfile", "json"):
        with pytest.raises(ImportError):
            import cProfile
        import json
    import cProfile

    assert cProfile.run is not None
    assert sys.modules["json"] is json, "a module that is imported already stays"
