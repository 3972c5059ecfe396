"""The megatron-core that would be imported, and hooks whose import hangs: findings, reported with all others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from config_run import Run

from slime.config.rules import imports

INFO = 'MAJOR = 0\nMINOR = 15\nPATCH = 1\nPRE_RELEASE = ""\n'


def test_another_megatron_is_a_finding(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.errors() == [], "control"
    core = run.directory / "tree" / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise RuntimeError('this tree is imported')\n")
    (core / "package_info.py").write_text(INFO)
    monkeypatch.delitem(sys.modules, "megatron", raising=False)
    monkeypatch.setattr(sys, "path", [str(core.parents[1]), *sys.path])
    errors = run.errors("--lr", "-1")
    found = f"megatron-core at {core}/package_info.py: is version 0.15.1, not 0.16.1; install megatron-core==0.16.1"
    assert [error for error in errors if error.startswith(found)] and len(errors) == 2
    assert any(warning.startswith(found) for warning in run.warnings("--dry-run"))


def test_a_plan_needs_no_megatron(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "megatron", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "editable" not in type(f).__module__.lower()])
    fault = imports.megatron_fault()
    assert fault is not None and fault.is_missing
    assert [problem for problem in run.warnings("--dry-run") if "megatron-core" in problem] == []
    assert [error for error in run.errors() if error.startswith("megatron-core: is not installed; install megatron-c")]


def test_a_hook_that_hangs_is_a_finding(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.directory / "hook_that_hangs.py").write_text(
        "import time\ntime.sleep(60)\ndef judge(args, sample): ...\ndef other(args, samples): ...\n"
    )
    monkeypatch.syspath_prepend(run.directory)
    monkeypatch.setattr(imports, "IMPORT_LIMIT", 0.05)
    monkeypatch.setattr(imports, "_NOTICE", 0.02)
    hooks = ("--custom-rm-path", "hook_that_hangs.judge", "--custom-reward-post-process-path", "hook_that_hangs.other")
    errors = run.errors(*hooks, "--num-steps-per-rollout", "3")
    assert [error for error in errors if "--num-steps-per-rollout 3" in error], "the other problems are there too"
    reported = [error for error in errors if "its import has not finished after 0.05 s; move code" in error]
    assert [error.split()[0] for error in reported] == ["--custom-rm-path", "--custom-reward-post-process-path"]
