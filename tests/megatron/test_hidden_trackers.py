"""A trainer loads no experiment tracker at its start, and a hook in a trainer can still use them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from slime.megatron.compat.hidden_trackers import TRACKERS, hidden


def ran(program: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("first", "loaded"),
    [
        ("import slime.megatron.trainer", []),
        ("import wandb, slime.megatron.trainer", ["wandb"]),
        ("import megatron.core.timers", list(TRACKERS)),
    ],
    ids=["trainer", "imported before", "control"],
)
def test_a_trainers_start_loads_no_tracker(first: str, loaded: list[str]) -> None:
    assert ran(f"import sys; {first}; print(*[name for name in {TRACKERS} if name in sys.modules])") == loaded


def test_a_hook_can_use_trackers() -> None:
    program = (
        "import slime.megatron.model.build, wandb; from wandb.sdk.lib import runid; "
        "from torch.utils.tensorboard import SummaryWriter; "
        "print(len(runid.generate_id()), wandb.teardown.__name__, SummaryWriter.__name__)"
    )
    assert len(ran(program)) == 3


def test_modules_are_hidden_only_inside_the_block() -> None:
    sys.modules.pop("cProfile", None)
    with hidden("cProfile", "json"):
        with pytest.raises(ImportError):
            import cProfile
        import json
    import cProfile

    assert cProfile.run is not None
    assert sys.modules["json"] is json, "a module that is imported already stays"
