"""Rules for tokens from older policies, in programs and modes that generate them."""

from __future__ import annotations

import pytest
from config_run import Run

from slime.config.parse import UsageError, load_args

HOOK = "slime.algo.losses.policy_loss"


def warnings(run: Run, words: str, rollouts_ahead: int) -> list[str]:
    found = load_args([*run.base, *words.split()], rollouts_ahead=rollouts_ahead)[1]
    return [str(warning) for warning in found if "weigh" in str(warning)]


@pytest.mark.parametrize("words", ["--tis-clip 3", "--offpolicy-correction mis --tis-clip-low 0.5"])
def test_clips_have_effect_if_tokens_may_be_older(run: Run, words: str) -> None:
    assert warnings(run, words, 1) == []
    assert warnings(run, f"{words} --use-tis", 0) == []
    assert warnings(run, f"{words} --load-debug-rollout-data {run.directory}/{{rollout_id}}.json", 0) == []
    assert warnings(run, f"{words} --dry-run --partial-rollout --over-sampling-batch-size 8", 0) == []
    assert len(warnings(run, words, 0)) == len(words.split()) // 2  # control
    masked = f"{words} --dry-run --partial-rollout --over-sampling-batch-size 8 --mask-offpolicy-in-partial-rollout"
    assert len(warnings(run, masked, 0)) == len(words.split()) // 2


def test_a_custom_loss_must_weight_itself(run: Run) -> None:
    own = f"--loss-type custom_loss --custom-loss-function-path {HOOK}"
    [warning] = warnings(run, own, 1)
    assert warning.startswith("--loss-type custom_loss: your loss must weight the tokens of LossInputs.weighted_R")
    assert len(warnings(run, f"{own} --use-tis", 0)) == 1
    assert warnings(run, own, 0) == warnings(run, f"{own} --offpolicy-correction none", 1) == []


def test_masking_older_tokens_is_refused_with_train_async(run: Run) -> None:
    with pytest.raises(UsageError) as raised:
        load_args([*run.base, "--dry-run", "--mask-offpolicy-in-partial-rollout"], rollouts_ahead=1)
    [problem] = raised.value.problems
    assert str(problem).startswith("--mask-offpolicy-in-partial-rollout: train_async.py generates with older weights")
