"""A trainer does not pay for W&B, and a hook in a trainer can have it."""

from __future__ import annotations

import subprocess
import sys


def test_it_is_loaded_where_it_is_used() -> None:
    program = (
        "import sys, slime.megatron.build; assert 'wandb.sdk' not in sys.modules; "
        "import wandb; assert 'wandb.sdk' not in sys.modules; wandb.Table; assert 'wandb.sdk' in sys.modules; "
        "from wandb.sdk.lib import runid; print(runid.generate_id(), wandb.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2
