"""A new estimator is one file and one row: flag, help, rules and training then know it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from slime.algo.estimators import ESTIMATOR_FACTS

ROOT = Path(__file__).parents[2]

FILE = '''
from torch import Tensor

from slime.algo.advantages.rollout_rewards import AdvantageOptions, RolloutRewards


def plain_reward(rollout: RolloutRewards, options: AdvantageOptions) -> Tensor:
    """Return the reward of a response on each of its tokens."""
    return rollout.spread(rollout.rewards_N)
'''
ROW = 'ESTIMATOR_FACTS["plain_reward"] = EstimatorFacts(compares_group=False)\n'
USE = """
from slime.config.help import format_help
from slime.config.parse import load_args

args, _ = load_args(["--advantage-estimator", "plain_reward", "--dry-run"], training=False)
assert (args.advantage_estimator, args.compares_group, args.uses_critic) == ("plain_reward", False, False)
assert "|plain_reward" in format_help(["algo"])

import torch
from slime.algo.advantages import ESTIMATORS, AdvantageOptions, RolloutRewards

rollout = RolloutRewards(
    rewards_N=torch.tensor([1.0, 3.0]),
    group_indices_N=torch.tensor([0, 1]),
    counted_N=torch.tensor([True, True]),
    response_lengths_N=torch.tensor([2, 1]),
    loss_mask_R=torch.ones(3),
)
assert ESTIMATORS["plain_reward"](rollout, AdvantageOptions()).tolist() == [1.0, 1.0, 3.0]
"""
FOUND_IN = """
import importlib.util, sys
from slime.algo.estimators import ESTIMATOR_FACTS, EstimatorFacts

class Finder:
    def find_spec(name, path, target=None):
        if name == "slime.algo.advantages.plain_reward":
            return importlib.util.spec_from_file_location(name, {file!r})

sys.meta_path.insert(0, Finder)
"""


def test_one_file_and_one_row_add_an_estimator(tmp_path: Path) -> None:
    file = tmp_path / "plain_reward.py"
    file.write_text(FILE)
    for row, problem in ((ROW, None), ("", "plain_reward")):
        code = FOUND_IN.format(file=str(file)) + row + USE
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        if problem is None:
            assert done.returncode == 0, done.stderr
        else:
            assert done.returncode != 0 and problem in done.stderr


def test_only_the_table_lists_estimators() -> None:
    names = ESTIMATOR_FACTS.keys() - {"cispo"}  # this one is also the name of a form of the loss
    places = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "slime").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert places == {"slime/algo/estimators.py", "slime/config/flags/algo_options.py"}, "the table, and the default"
