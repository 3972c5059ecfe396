"""run.json says how each start of a run was made, without secrets, and never ends a run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import slime
from slime.core.masking import Masker
from slime.observability.run_record import add_start, checkout, command_line, describe_start

PLAN = "Model\n  judge http://me:pw@host"


def starts(directory: Path) -> list[dict[str, object]]:
    return json.loads((directory / "run.json").read_text(encoding="utf-8"))["starts"]


def test_every_start_is_an_entry(tmp_path: Path) -> None:
    command = [*command_line(), "--rm-url", "http://judge?key=key-of-judge", "ключ \ud800"]
    for number in range(2):
        entry = describe_start(command, PLAN, Masker(["key-of-judge"]), {"run": "a", "restarts": number})
        assert add_start(tmp_path, entry) == []
    first, second = starts(tmp_path)
    assert (first["restarts"], second["restarts"]) == (0, 1)
    assert first["plan"] == ["Model", "  judge http://***@host"]
    versions = first["versions"]
    assert isinstance(versions, dict)
    assert versions["slime"] == slime.__version__ and versions["torch"] and "sglang" in versions
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    assert "key-of-judge" not in text and "ключ" in text
    unmasked = describe_start(command, PLAN, Masker(), {})
    assert "key-of-judge" in str(describe_start(["key-of-judge"], PLAN, Masker(), {})["command"]), "the control"
    assert "key-of-judge" not in str(unmasked["command"]), "a query value is a secret by itself"


def test_a_checkout_is_named_with_its_state(tmp_path: Path) -> None:
    assert checkout(tmp_path / "missing") is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert checkout(tmp_path) is None, "no commit yet"
    (tmp_path / "reward.py").write_text("1")
    subprocess.run([*git, "add", "reward.py"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    found = checkout(tmp_path)
    assert found is not None and len(found["commit"]) == 40 and found["dirty"] is False
    (tmp_path / "reward.py").write_text("2")
    assert checkout(tmp_path) == {"commit": found["commit"], "dirty": True}


def test_no_git_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    entry = describe_start(["train.py"], "", Masker(), {})
    assert entry["git"] == {"slime": None, "folder": None}


def test_an_unusable_file_is_a_warning(tmp_path: Path) -> None:
    for content in ("not json", "[]", '{"starts": 3}', "[" * 100_000):
        (tmp_path / "run.json").write_text(content)
        [warning] = add_start(tmp_path, {"run": "a"})
        assert "moved to run-damaged.json" in warning
        assert (tmp_path / "run-damaged.json").read_text() == content
        assert starts(tmp_path) == [{"run": "a"}]
    (tmp_path / "run.json").unlink()
    (tmp_path / "run.json").mkdir()
    [warning] = add_start(tmp_path, {})
    assert "the run goes on without it" in warning
