"""The names that users import from `slime`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import slime

NAMES = [
    "HOOKS",
    "MultiTurnEnv",
    "RolloutContext",
    "RolloutResult",
    "Sample",
    "Status",
    "TrainBatch",
    "__version__",
    "append_environment",
    "append_messages",
]


def test_the_public_names_are_these() -> None:
    assert sorted(slime.__all__) == NAMES
    assert all(getattr(slime, name) is not None for name in NAMES)
    assert slime.Sample.__module__ == "slime.core.sample"
    assert not hasattr(slime, "Trainer"), "control"


def test_import_loads_nothing_and_types_are_shipped() -> None:
    code = "import sys, slime; print([name for name in sys.modules if name.startswith('slime.') or name == 'numpy'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert (Path(slime.__file__).parent / "py.typed").exists()
