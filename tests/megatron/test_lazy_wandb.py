"""A trainer does not load W&B at its start, and a hook in a trainer can still use it."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("use", ["wandb.Table", "from wandb.sdk.internal.datastore import DataStore"])
def test_wandb_is_loaded_when_it_is_used(use: str) -> None:
    program = (
        "import sys, slime.megatron.model.build; assert 'wandb.sdk' not in sys.modules; "
        f"import wandb; assert 'wandb.sdk' not in sys.modules; {use}; assert 'wandb.sdk' in sys.modules; "
        "from wandb.sdk.lib import runid; print(runid.generate_id(), wandb.teardown.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2
