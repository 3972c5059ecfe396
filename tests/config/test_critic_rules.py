"""The critic's flags: their resolved values, and errors and warnings about wrong ones."""

from __future__ import annotations

import pytest
from config_run import Run

PPO = "--advantage-estimator ppo --n-samples-per-prompt 1 --rollout-batch-size 16"


def test_only_ppo_trains_a_critic(run: Run) -> None:
    args = run.args(*PPO.split(), "--lr", "2e-6")
    assert args.uses_critic and args.critic_lr == 2e-6, "unset: the policy's rate"
    assert run.args(*PPO.split(), "--critic-lr", "1e-5").critic_lr == 1e-5
    assert not run.args().uses_critic
    sft = run.args(*PPO.split(), "--loss-type", "sft_loss")
    assert not sft.uses_critic


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--critic-load FILE", "is a file, not a directory"),
        ("--critic-load NOWHERE", "there is no such directory"),
        ("--lr-decay-style linear --lr-decay-iters 5 --critic-lr-warmup-iters 5", "the warm-up must end before"),
        ("--lr-decay-style linear --num-critic-only-steps 3 --num-rollout 4 --lr-warmup-iters 2", "optimizer step 1"),
    ],
)
def test_errors(run: Run, words: str, message: str) -> None:
    (run.directory / "file").touch()
    places = {"FILE": run.directory / "file", "NOWHERE": run.directory / "nowhere"}
    for name, path in places.items():
        words = words.replace(name, str(path))
    assert any(message in error for error in run.errors(*PPO.split(), *words.split()))
    assert not run.errors(*PPO.split(), "--lr-decay-style", "linear", "--critic-lr-warmup-iters", "1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{PPO} --num-rollout 4 --num-critic-only-steps 4", "only the critic learns in all 4 rollouts"),
        ("--critic-lr 1e-5", "there is no critic; it belongs to --advantage-estimator ppo"),
        ("--num-critic-only-steps 2", "there is no critic"),
    ],
)
def test_warnings(run: Run, words: str, message: str) -> None:
    assert any(message in warning for warning in run.warnings(*words.split()))
    assert not any("critic" in warning for warning in run.warnings(*PPO.split(), "--num-critic-only-steps", "1"))


def test_the_plan_counts_the_critic(run: Run) -> None:
    from slime.plan.memory_model import train_memory

    policy, both = run.args(), run.args(*PPO.split())
    alone, together = train_memory(policy, on_cuda=True), train_memory(both, on_cuda=True)
    assert alone is not None and together is not None
    assert alone.critic == 0 and together.critic > alone.weights + alone.gradients
    assert together.peaks["step"] - alone.peaks["step"] == together.critic
