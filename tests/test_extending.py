"""Reward, transport and engine kind are each one file and one row: the command line and their users know dummies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

FILE = """
from slime.core.boxes import Answer
from slime.rollout.rewards.response import final_answer
from slime.rollout.rewards.reward import Reward, against_label

def same_length(answer: Answer | None, label: str) -> float:
    return float(answer is not None and len(answer.text) == len(label))

REWARD = Reward(read=final_answer, score=against_label(same_length))
"""
ROWS = """
from slime.config.engine_kinds import ENGINE_KINDS, EngineFacts
from slime.config.reward_types import REWARD_TYPES, RewardFacts
from slime.config.weight_transports import TRANSPORTS, TransportFacts
ENGINE_KINDS["dummy"] = EngineFacts(label="a dummy", module="tests.engine.dummy_kind", on_cpu=True)
REWARD_TYPES["same_length"] = RewardFacts(module="same_length")
TRANSPORTS["pigeon"] = TransportFacts(transport="pigeon.Pigeon")
"""
USE = """
import asyncio, pickle
from slime.config.parse import load_args
from slime.core.sample import Sample
from slime.engine.kinds.kind import kind_of
from slime.rollout.reward_pool.worker import Judge

words = ["--dry-run", "--rm-type", "boxed_same_length", "--label-key", "label", "--update-weight-transport", "pigeon"]
words += ["--rollout-engine", "dummy"]
args, _ = load_args(words, training=False)
assert args.update_weight_transport == "pigeon"
assert kind_of(args).phases == (("opening", "opening its server"),)
with asyncio.Runner() as runner:
    for label, score in (("cd", 1.0), ("e", 0.0)):
        sample = Sample(response=r"\\boxed{ab}", label=label)
        [verdict] = Judge(args, marks=False).judge(pickle.dumps((args.rm_type, sample)), runner)
        assert verdict.reward == score, verdict
"""


def test_rows_reach_the_command_line_and_the_grader(tmp_path: Path) -> None:
    (tmp_path / "same_length.py").write_text(FILE)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    for rows in (ROWS, ""):
        command = [sys.executable, "-c", rows + USE]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        if rows:
            assert done.returncode == 0, done.stderr
        else:
            assert done.returncode != 0
            assert "--update-weight-transport pigeon: must be one of auto, broadcast, disk" in done.stderr
            assert "--rollout-engine dummy: must be one of auto, sglang, embedded" in done.stderr
