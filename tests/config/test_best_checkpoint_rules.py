"""The rule for --keep-best-checkpoint: evaluation reports the metric, and checkpoints are evaluated."""

from __future__ import annotations

import pytest
from config_run import Run

from slime.config.args import SFT_ROLLOUT

FLAG = "--keep-best-checkpoint"
EVAL = "--n-samples-per-eval-prompt 4 --eval-prompt-data few TRAIN --num-rollout 20"
MEET = f"{EVAL} --save-interval 5 --eval-interval 10"


def words(run: Run, text: str) -> list[str]:
    return [str(run.data) if word == "TRAIN" else word for word in f"--save {run.directory}/save {text}".split()]


@pytest.mark.parametrize("metric", ["eval/few/reward", "eval/few/pass@1", "eval/few/pass@4", "eval/few/format"])
def test_metrics_of_which_larger_is_better(run: Run, metric: str) -> None:
    given = words(run, f"{MEET} {FLAG} {metric}")
    assert run.args(*given).keep_best_checkpoint == metric
    assert [warning for warning in run.warnings(*given) if FLAG in warning] == []


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (f"{MEET} {FLAG} reward", f"{FLAG} reward: is not an evaluation metric; write it as eval/NAME/reward"),
        (
            f"{MEET} {FLAG} eval/aime/reward",
            f"{FLAG} eval/aime/reward: there is no evaluation set 'aime'; name one of few",
        ),
        (
            f"{MEET} {FLAG} eval/few/failed",
            "few has no metric 'failed' of which a larger value is better; name one of",
        ),
        (f"{MEET} {FLAG} eval/few/pass@3", "name one of reward, reward_judged, format, pass@1, pass@2, pass@4"),
        (f"--num-rollout 20 {FLAG} eval/few/reward", f"{FLAG} eval/few/reward: nothing is evaluated; add --eval-pr"),
    ],
)
def test_errors(run: Run, text: str, error: str) -> None:
    [found] = [problem for problem in run.errors(*words(run, text)) if FLAG in problem]
    assert error in found


def test_the_loss_of_sft_is_ranked(run: Run) -> None:
    sft = f"--loss-type sft_loss --rollout-function-path {SFT_ROLLOUT} --rollout-num-gpus 0 --num-rollout 20"
    shared = f"{sft} --save-interval 5 --eval-interval 10 --eval-prompt-data few TRAIN"
    for metric in ("loss", "loss_per_sample"):
        assert run.errors(*words(run, f"{shared} {FLAG} eval/few/{metric}")) == []
    [error] = run.errors(*words(run, f"{shared} {FLAG} eval/few/reward"))
    assert "few has no metric 'reward' of which a smaller value is better; name one of loss, loss_per_sample" in error
    [error] = [each for each in run.errors(*words(run, f"{MEET} {FLAG} eval/few/loss")) if FLAG in each]
    assert "of which a larger value is better" in error, "control"


def test_a_custom_evaluation_names_its_own_metrics(run: Run) -> None:
    own = "--eval-function-path examples.hooks.rollouts.evaluate_twice"
    assert run.errors(*words(run, f"{MEET} {own} {FLAG} eval/own/score")) == []


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        ("--save-interval 5 --eval-interval 10", False),
        ("--save-interval 4 --eval-interval 5", True),
        ("--save-interval 5", True),
        ("--eval-interval 5", True),
    ],
)
def test_intervals_that_never_meet_give_a_warning(run: Run, text: str, warned: bool) -> None:
    given = words(run, f"{EVAL} {text} {FLAG} eval/few/reward")
    rule = "only the last checkpoint is both saved and evaluated"
    assert any(rule in warning for warning in run.warnings(*given)) == warned


def test_without_checkpoints_it_has_no_effect(run: Run) -> None:
    given = words(run, f"{EVAL} --num-rollout 0 {FLAG} eval/few/reward")
    assert any(f"{FLAG} eval/few/reward: no effect: --num-rollout 0" in warning for warning in run.warnings(*given))
