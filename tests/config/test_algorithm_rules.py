"""Rules for estimators: which ones need a group, and which flags have no effect or make no sense with them."""

from __future__ import annotations

import shutil

import pytest
from config_run import Run, write_tokenizer

from slime.algo.estimators import ESTIMATOR_FACTS
from slime.config.parse import load_args


@pytest.mark.parametrize("name", sorted(name for name in ESTIMATOR_FACTS if not ESTIMATOR_FACTS[name].distills))
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
        ("--kl-clamp -1", "--kl-clamp -1:"),
        ("--eps-clip 1.1", "--eps-clip 1.1:"),
        ("--rollout-max-response-len 64 --overlong-buffer-len 64", "--overlong-buffer-len 64: --rollout-max-response-"),
        ("--overlong-buffer-len 8 --overlong-penalty-factor 0", "--overlong-penalty-factor 0:"),
    ],
)
def test_refused(run: Run, words: str, error: str) -> None:
    [found] = run.errors(*words.split())
    assert found.startswith(error)


@pytest.mark.parametrize(
    ("words", "in_loss", "in_reward"),
    [
        ("", 10.0, None),
        ("--kl-loss-type k3", None, None),
        ("--kl-clamp 0", None, None),
        ("--kl-clamp 4", 4.0, 4.0),
        ("--kl-clamp 4 --kl-loss-type k1", 4.0, 4.0),
    ],
)
def test_default_kl_bounds(words: str, in_loss: float | None, in_reward: float | None) -> None:
    args = load_args([*words.split(), "--dry-run", "--num-rollout", "1"], training=False)[0]
    assert (args.kl_loss_clamp, args.kl_reward_clamp) == (in_loss, in_reward)


OWN = "--custom-advantage-function-path examples.hooks.training.reward_minus_mean"
GSPO = "--advantage-estimator gspo"


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        ("--gamma 0.9", "--gamma 0.9: no effect: the estimator discounts nothing"),
        ("--sft-loss-on last_assistant", "--sft-loss-on last_assistant: no effect: only SFT learns from conversations"),
        ("--kl-clamp 5", "--kl-clamp 5: no effect: there is no KL to the reference model"),
        ("--advantage-estimator reinforce_plus_plus --lambd 0.9", "--lambd 0.9: no effect: it belongs to GAE"),
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
            "--advantage-estimator gspo: no effect: with your own loss, only this estimator's advantages are used",
        ),
        (f"{GSPO} --num-steps-per-rollout 2", "--eps-clip 0.2: gspo's ratio is a mean over the response"),
        (f"{GSPO} --calculate-per-token-loss", "--calculate-per-token-loss: gspo weights all responses equally"),
        ("--overlong-penalty-factor 2", "--overlong-penalty-factor 2: no effect: no response is penalized"),
        ("--loss-type sft_loss --mask-truncated-samples", "--mask-truncated-samples: no effect: --loss-type sft"),
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
        "--overlong-buffer-len 16 --overlong-penalty-factor 0.5 --mask-truncated-samples",
    ],
)
def test_passes_without_warnings(run: Run, words: str) -> None:
    assert run.warnings(*words.split()) == []


def test_a_kl_in_the_reward_needs_its_reference(run: Run) -> None:
    assert run.args("--kl-coef", "0.1").needs_reference
    assert not run.args("--kl-coef", "0").needs_reference


DISTILLATION = ("--advantage-estimator", "on_policy_distillation", "--n-samples-per-prompt", "1")


def test_a_teacher_is_another_model_with_equal_tokens(run: Run) -> None:
    teacher = run.directory / "teacher"
    shutil.copytree(run.hf, teacher)
    words = (*DISTILLATION, "--ref-load", str(teacher))
    assert run.errors(*words) == []
    assert run.args(*words).needs_reference
    assert run.warnings(*words, "--kl-coef", "0.1", "--gamma", "0.9") == [
        "--gamma 0.9: no effect: the estimator discounts nothing; leave it out",
        "--kl-coef 0.1: no effect: --advantage-estimator on_policy_distillation reads no reward; leave it out",
    ]
    itself = run.error(*DISTILLATION, "--ref-load", str(run.hf))
    assert itself.startswith(f"--ref-load {run.hf}: teacher and student are the same model")
    assert run.args("--ref-load", str(run.hf)).needs_reference is False  # not a teacher here
    write_tokenizer(teacher, largest_id=100)
    assert run.error(*words).startswith(f"--ref-load {teacher}: its tokenizer differs")


def test_a_teacher_has_to_be_named(run: Run) -> None:
    at = run.base.index("--ref-load")
    run.base[at : at + 2] = []
    assert run.error(*DISTILLATION).startswith("--ref-load: not given; the teacher is loaded from it")
