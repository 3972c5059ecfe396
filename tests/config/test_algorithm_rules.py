"""Rules about estimators: which of them need a group, and what beside them says nothing or makes no sense."""

from __future__ import annotations

import pytest
from config_run import Run

from slime.algo.estimators import ESTIMATOR_FACTS


@pytest.mark.parametrize("name", sorted(ESTIMATOR_FACTS))
def test_one_sample_alone_has_no_baseline(run: Run, name: str) -> None:
    words = ("--dry-run", "--advantage-estimator", name, "--n-samples-per-prompt", "1")
    found = run.errors(*words)
    if not ESTIMATOR_FACTS[name].compares_group:
        assert found == []
        return
    [error] = found
    assert error.startswith(f"--n-samples-per-prompt 1: {name} compares the samples of one prompt")
    assert run.errors(*words, "--custom-advantage-function-path", "examples.hooks.training.reward_minus_mean") == []


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--advantage-estimator cispo --eps-clip-c 3", "--eps-clip-c 3: cispo clips a weight"),
        ("--advantage-estimator trpo", "--advantage-estimator trpo:"),
        ("--gamma 1.5", "--gamma 1.5:"),
        ("--kl-coef -1", "--kl-coef -1:"),
        ("--eps-clip 1.1", "--eps-clip 1.1:"),
    ],
)
def test_refused(run: Run, words: str, error: str) -> None:
    [found] = run.errors(*words.split())
    assert found.startswith(error)


OWN = "--custom-advantage-function-path examples.hooks.training.reward_minus_mean"
GSPO = "--advantage-estimator gspo"


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        ("--gamma 0.9", "--gamma 0.9: no effect: the estimator gives a response one advantage"),
        ("--advantage-estimator reinforce_plus_plus --lambd 0.9", "--lambd 0.9: no effect: it is GAE's"),
        (
            "--advantage-estimator rloo --disable-grpo-std-normalization",
            "--disable-grpo-std-normalization: no effect: the estimator does not divide",
        ),
        (
            "--advantage-estimator reinforce_plus_plus_baseline --normalize-advantages",
            "--normalize-advantages: no effect: the estimator whitens its advantages itself",
        ),
        (f"{OWN} --kl-coef 0.1", "--kl-coef 0.1: no effect: --custom-advantage-function-path computes the advantages"),
        (
            f"{GSPO} --loss-type custom_loss --custom-loss-function-path slime.algo.losses.sft_loss",
            "--advantage-estimator gspo: no effect: of this estimator your own loss leaves the advantages only",
        ),
        (f"{GSPO} --num-steps-per-rollout 2", "--eps-clip 0.2: gspo's ratio is a mean over the response"),
        (f"{GSPO} --calculate-per-token-loss", "--calculate-per-token-loss: gspo counts all responses alike"),
        ("--loss-type sft_loss --advantage-estimator rloo", "--advantage-estimator rloo: no effect: --loss-type sft"),
    ],
)
def test_warned(run: Run, words: str, warning: str) -> None:
    found = run.warnings(*words.split())
    assert [text for text in found if text.startswith(warning)], found


@pytest.mark.parametrize(
    "words",
    [
        f"{GSPO} --num-steps-per-rollout 2 --eps-clip 3e-4 --eps-clip-high 4e-4 --eps-clip-c 3",
        GSPO,
        "--advantage-estimator cispo --eps-clip 1 --eps-clip-high 0.3 --calculate-per-token-loss",
        "--advantage-estimator rloo --kl-coef 0.1 --normalize-advantages",
        "--advantage-estimator reinforce_plus_plus --gamma 0.99 --kl-coef 0.01 --n-samples-per-prompt 1",
        "--advantage-estimator reinforce_plus_plus_baseline --gamma 0.99",
        "--disable-grpo-std-normalization --calculate-per-token-loss",
    ],
)
def test_runs_without_a_word(run: Run, words: str) -> None:
    assert run.warnings(*words.split()) == []


def test_a_kl_in_the_reward_needs_its_reference(run: Run) -> None:
    assert run.args("--kl-coef", "0.1").needs_reference
    assert not run.args("--kl-coef", "0").needs_reference
