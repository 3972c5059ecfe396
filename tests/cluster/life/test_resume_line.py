"""The command that continues a run which a signal has ended."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

from slime.cluster.life.resume_line import command_to_resume, program_words
from slime.config.args import Args
from slime.config.flags.table import spellings
from slime.config.ray_job import IN_A_JOB

PROGRAM = ["slime", "train"]


def resumed(words: list[str], args: Args, newest: int | None = 4) -> str:
    """Return the line of the command; all of its flags exist."""
    first, line = command_to_resume(words, args, newest, PROGRAM).splitlines()
    assert first == ("start again with:" if newest is None else "resume with:")
    assert all(word.partition("=")[0] in spellings() for word in shlex.split(line) if word.startswith("--"))
    return line


def test_the_resume_command_loads_the_save() -> None:
    words = ["--save", "my run", "--load=/old", "--ckpt-step", "3", "--finetune", "--lr", "1e-5"]
    line = resumed(words, Args(save="my run", load="/old", ckpt_step=3, finetune=True))
    assert line == "slime train --save 'my run' --lr 1e-5 --load 'my run' --ckpt-step 4 --no-finetune"


def test_flags_of_a_file_are_overridden() -> None:
    line = resumed(["run.yaml"], Args(save="out", load="/old", ckpt_step=2, no_load_rng=True))
    assert line == "slime train run.yaml --save out --load out --ckpt-step 4 --load-rng"


def test_a_save_without_optimizer_is_loaded_without() -> None:
    args = Args(save="out", no_save_optim=True)
    assert resumed(["--save", "out", "--no-save-optim"], args).endswith("--load out --no-load-optim")
    assert resumed(["--no-load-optim"], Args(save="out", no_load_optim=True)).endswith("--load out --load-optim")


def test_a_run_without_checkpoint_starts_again() -> None:
    words = ["--save", "out", "--load", "/old"]
    assert resumed(words, Args(save="out", load="/old"), None) == "slime train --save out --load /old"


def test_secrets_in_the_command_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(IN_A_JOB, "{}")
    words = ["--save", "out", "--sglang-api-key", "very-secret"]
    first, line, hint = command_to_resume(words, Args(save="out"), 4, PROGRAM).splitlines()
    assert first == "resume with, submitted as before (`ray job submit ... --`):"
    assert "very-secret" not in line
    assert "--sglang-api-key '***" in line
    assert hint == "*** replaces the secrets: give --sglang-api-key again, as is or as env:NAME"


@pytest.mark.parametrize(
    ("words", "program"),
    [
        (["python3", "train.py", "--lr", "1"], ["python3", "train.py"]),
        (["python3", "-m", "slime", "train-async", "--lr", "1"], ["python3", "-m", "slime", "train-async"]),
        (["python3", "train.py", "run.yaml"], [sys.executable, "-m", "slime", "train"]),
    ],
)
def test_the_program_is_named_as_it_was(words: list[str], program: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", words)
    assert program_words(["--lr", "1"], "train") == program


def test_the_console_script_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "slime"
    script.touch(mode=0o755)
    monkeypatch.setattr(sys, "orig_argv", ["/venv/bin/python3", str(script), "train", "--lr", "1"])
    assert program_words(["--lr", "1"], "train") == [str(script), "train"]
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert program_words(["--lr", "1"], "train") == ["slime", "train"]
