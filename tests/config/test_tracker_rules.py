"""Rules for trackers: a missing package or account is reported before anything starts."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from config_run import Run

from slime.config.experiment_trackers import TRACKERS
from slime.config.resolve import in_directory
from slime.config.rules.imports import is_installed


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_its_extra(run: Run, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    error = f"--use-{name}: {name} is not installed; pip install 'slime[{name}]'"
    assert run.error(f"--use-{name}") == error
    assert error in run.warnings(f"--use-{name}", "--dry-run")


def test_a_directory_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B makes ./wandb, which Python would import if the package is missing."""
    (tmp_path / "a_directory").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_spec("a_directory") is not None, "the control"
    assert not is_installed("a_directory")
    assert is_installed("pytest")


def test_wandb_needs_an_account_or_to_be_offline(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for mode, errors in (("online", 1), ("offline", 0)):
        monkeypatch.setenv("WANDB_MODE", mode)
        wandb.teardown()
        assert len(run.errors("--use-wandb")) == errors
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()
    assert run.error("--use-wandb").startswith("--use-wandb: W&B has no API key, and would ask for it; set WANDB_API_")
    wandb.teardown()


@pytest.mark.parametrize("name", [name for name, facts in TRACKERS.items() if facts.switch is None])
def test_a_tracker_without_a_switch_is_named(run: Run, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert run.error("--trackers", name) == f"--trackers {name}: {name} is not installed; pip install 'slime[{name}]'"


def test_swanlab_needs_an_account_or_to_be_offline(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("swanlab") is None:
        pytest.skip("swanlab is not installed: pip install 'slime[swanlab]'")
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
    monkeypatch.setenv("SWANLAB_MODE", "online")
    error = "--trackers swanlab: SwanLab has no API key; set SWANLAB_API_KEY, or SWANLAB_MODE=offline"
    assert run.error("--trackers", "swanlab") == error
    monkeypatch.setenv("SWANLAB_MODE", "local")
    assert "its mode local needs swanboard" in run.error("--trackers", "swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    assert run.errors("--trackers", "swanlab") == []


def test_event_directory(run: Run, tmp_path: Path) -> None:
    args = run.args("--use-tensorboard", "--save", str(tmp_path / "save"))
    assert args.tensorboard_dir == f"{tmp_path}/save/tensorboard"
    assert in_directory(run.args("--use-tensorboard"), "own").tensorboard_dir == "own/tensorboard"
    assert run.args().tensorboard_dir is None
    [warning] = run.warnings("--tensorboard-dir", str(tmp_path))
    assert "no effect: it belongs to --use-tensorboard" in warning
    [warning] = run.warnings("--wandb-group", "x")
    assert "no effect: it belongs to --use-wandb" in warning


def test_a_name_in_trackers_is_its_switch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    args = in_directory(run.args("--trackers", "tensorboard"), "own")
    assert (args.use_tensorboard, args.tensorboard_dir) == (True, "own/tensorboard")
    assert args.tracker_names == run.args("--use-tensorboard").tracker_names == ("tensorboard",)
    assert run.args().tracker_names == ()
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run.error("--trackers", "wandb").startswith("--trackers wandb: wandb is not installed")
