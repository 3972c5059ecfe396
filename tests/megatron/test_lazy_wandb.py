"""A trainer does not pay for W&B, and a hook in a trainer can have it."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("use", ["wandb.Table", "from wandb.sdk.internal.datastore import DataStore"])
def test_it_is_loaded_where_it_is_used(use: str) -> None:
    program = (
        "import sys, slime.megatron.build; assert 'wandb.sdk' not in sys.modules; "
        f"import wandb; assert 'wandb.sdk' not in sys.modules; {use}; assert 'wandb.sdk' in sys.modules; "
        "from wandb.sdk.lib import runid; print(runid.generate_id(), wandb.teardown.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2
