"""In the package of a Ray job, relative outputs are refused; everywhere else they are not."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_run import Run

RULE = "a job's own folder is Ray's temporary copy of --working-dir, in which outputs would be lost"


@pytest.fixture
def in_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)


@pytest.mark.usefixtures("in_a_job")
@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("--save out/run", ["--save out/run"]),
        ("--save /data/run --log-dir logs", ["--log-dir logs"]),
        ("--save /data/run --save-hf hf/{rollout_id}", ["--save-hf hf/{rollout_id}"]),
        ("--log-dir /data/logs --save-debug-train-data steps", ["--save-debug-train-data steps"]),
    ],
)
def test_relative_outputs_of_a_job_are_refused(run: Run, words: str, wrong: list[str]) -> None:
    found = [error for error in run.errors("--dry-run", *words.split()) if RULE in error]
    assert [error.partition(":")[0] for error in found] == wrong
    assert all("give the whole path, such as /data/" in error for error in found)


@pytest.mark.usefixtures("in_a_job")
def test_a_job_needs_a_directory(run: Run) -> None:
    assert run.error().startswith(
        "--save: not given, and a job's own folder is Ray's temporary copy, in which outputs/"
    )


@pytest.mark.usefixtures("in_a_job")
def test_whole_paths_of_a_job_pass(run: Run, tmp_path: Path) -> None:
    assert run.errors("--save", str(tmp_path / "run"), "--save-hf", f"{tmp_path}/hf") == []


def test_relative_outputs_pass_elsewhere(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run.errors("--save", "out") == []
