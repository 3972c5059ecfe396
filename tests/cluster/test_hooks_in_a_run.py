"""A whole run of the guessing game with hooks from files of the current folder, which print, fail, and end the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slime.observability.metrics_log import read_metrics
from tests.cluster.runs import ROOT, RUN_TIMEOUT_S, SMALL, Task, environment, flags

pytestmark = [pytest.mark.usefixtures("joined_ray"), pytest.mark.timeout(900)]

HOOKS = """
import os
from examples.guess_number.game import GuessNumber

class NotFoundError(Exception):
    def __init__(self, message, *, response):
        super().__init__(message)

class Talking(GuessNumber):
    stop = tuple("abcdefghijklmnopqrstuvwxyz")  # the model is random: so it ends its turns

    def reply(self, said):
        print("said", repr(said))
        os.system("echo from a child")
        if self.sample.index % 8 == 7:
            raise NotFoundError("no such tool", response=404)
        return super().reply(said)

generate = Talking.generate

def log(args, rollout_id, samples, metrics):
    if rollout_id == 1:
        raise NotFoundError("no such project", response=404)
"""


def test_hooks_from_a_file_of_the_current_folder(task: Task, tmp_path: Path) -> None:
    folder, save = tmp_path / "folder", tmp_path / "run"
    folder.mkdir()
    (folder / "hooks_of_a_user.py").write_text(HOOKS)
    words = ["--custom-generate-function-path", "hooks_of_a_user.py:generate", "--rollout-max-response-len", "40"]
    words += ["--custom-rollout-log-function-path", "hooks_of_a_user.log", "--rollout-batch-size", "2", *SMALL]
    command = [sys.executable, str(ROOT / "train.py"), *flags(task, save, *words, length=("--num-rollout", "3"))]
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False
    )
    output = done.stdout + done.stderr
    assert done.returncode == 1, output[-4000:]
    place = f"({folder}/hooks_of_a_user.py:"
    told = "--custom-rollout-log-function-path hooks_of_a_user.log: it raised NotFoundError: no such project"
    assert f"{told} {place}" in output
    assert "FAULT" not in output and " died" not in output, "it is no fault, for which the run would start again"
    [record] = [event for event in read_metrics(save / "metrics.jsonl") if "rollout/reward" in event]
    assert record["rollout/generation_failed"] == 1
    assert 1 <= record["rollout/num_turns"] <= 4
    log = (save / "logs" / "rollout.log").read_text()
    assert "router: round_robin: there is only one engine" in log
    assert log.count("sample 7: said") == 1
    for part in ("sample 0: said", "from a child", "rollout 0, sample 7 failed: NotFoundError: no such tool", told):
        assert part in log, part
    assert 'hooks_of_a_user.py", line' in log, "a whole traceback"
