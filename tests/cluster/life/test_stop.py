"""A request to stop: what a signal does at which time, and the command to continue with. (Whole runs: `test_async`.)"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slime.cluster.life.resume_line import IN_A_JOB, command_to_resume, program_words
from slime.cluster.life.stop import REPEAT_S, Stop, Stopped
from slime.cluster.manager.abortable import Abortable
from slime.cluster.on_ray.own_session import children_in_own_sessions
from slime.config.args import Args
from slime.config.flags.table import spellings
from slime.core.errors import RunError

PROGRAM = ["slime", "train"]


@pytest.fixture(autouse=True)
def sigint_is_not_ignored() -> Iterator[None]:
    """A shell starts a program in the background with SIGINT ignored, and `Stop` leaves it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_without_work_ends_at_once() -> None:
    stop = Stop()
    with stop.heeded(), pytest.raises(Stopped) as caught:
        signal.raise_signal(signal.SIGTERM)
    assert (stop.asked, caught.value.code) == (signal.SIGTERM, 143)


def test_a_signal_waits_for_the_save() -> None:
    stop = Stop()
    with stop.heeded():
        stop.hold()
        signal.raise_signal(signal.SIGINT)
        assert (stop.asked, stop.status) == (signal.SIGINT, 130)
        with pytest.raises(Stopped):
            stop.let_go("run/iter_0000003")
    assert stop.saved == "run/iter_0000003"


def test_a_save_without_a_signal_ends_nothing() -> None:
    stop = Stop()
    with stop.heeded():
        stop.hold()
        stop.let_go("run/iter_0000003")
        assert stop.asked is stop.saved is None
        with pytest.raises(Stopped):  # nothing waits any longer
            signal.raise_signal(signal.SIGINT)


def test_a_second_signal_ends_at_once() -> None:
    """One that is passed on within half a second, by a program such as `timeout`, is no second one."""
    stop = Stop()
    with stop.heeded():
        stop.hold()
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        time.sleep(REPEAT_S)
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
    assert stop.saved is None


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stop = Stop()
        with stop.heeded():
            stop.install()
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL, "control"
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_end_with_the_run() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Stop().heeded():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# --- processes of Ray ---------------------------------------------------------------------------------------------


def test_children_get_sessions_of_their_own() -> None:
    def session_of_a_child() -> int:
        # Like Ray, with a preexec_fn.
        with subprocess.Popen(["sleep", "60"], preexec_fn=lambda: None) as child:
            try:
                return os.getsid(child.pid)
            finally:
                child.kill()

    own = os.getsid(0)
    with children_in_own_sessions():
        assert session_of_a_child() != own
    assert session_of_a_child() == own, "control"


# --- work that is aborted ------------------------------------------------------------------------------------------


def test_aborted_work_is_an_error() -> None:
    async def main() -> list[str]:
        seen: list[str] = []

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

        abortable = Abortable()
        running = asyncio.ensure_future(abortable.run(work))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await abortable.abort()
        for each in (running, abortable.run(work)):  # the second begins too late
            with pytest.raises(RunError, match="aborted"):
                await each
        return seen

    assert asyncio.run(main()) == ["cancelled"]


def test_finished_work_is_not_aborted() -> None:
    async def main() -> int:
        async def work() -> int:
            return 7

        abortable = Abortable()
        running = asyncio.ensure_future(abortable.run(work))
        for _ in range(2):  # the work is done, and nobody has taken its result
            await asyncio.sleep(0)
        await abortable.abort()
        return await running

    assert asyncio.run(main()) == 7


# --- the command to continue with ----------------------------------------------------------------------------------


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
