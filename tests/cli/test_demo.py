"""`slime demo`: each of its runs plans, and its commands name files that the ones before have made."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import slime.cli.arithmetic
from slime.cli.demo import MODELS, SLIME, Demo, Step, main, run_step, stages, training_runs
from slime.cli.main import COMMANDS
from slime.core.errors import RunError
from slime.plan.fit import load_run

CONFIGS = Path(slime.cli.arithmetic.__file__).parent
ROOT = Path(__file__).parents[2]


def commands(demo: Demo) -> list[tuple[str, ...]]:
    """Return the words after `python -m slime` of each command that is one of slime's."""
    words = [step.words for _, steps in stages(demo, CONFIGS) for step in steps]
    return [found[len(SLIME) :] for found in words if found[: len(SLIME)] == SLIME]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("control", [False, True])
def test_its_runs_plan(model: str, control: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    demo = Demo(model=model, control=control, seed=3, more=("--num-rollout", "7"))
    found = commands(demo)
    assert [words[0] for words in found] == ["train", "convert", "train", "export", "answers", "plot"]
    assert {words[0] for words in found} <= COMMANDS.keys()
    sft, grpo = (load_run([*words, "--dry-run"]) for words in training_runs(demo, CONFIGS))
    for args, problems in (sft, grpo):
        assert [str(problem) for problem in problems if "no effect" in problem.rule and "kl" not in problem.where] == []
        assert (args.seed, args.rollout_seed, args.actor_num_gpus_per_node) == (3, 3, 2)
        assert Path(args.save or "").parent == demo.directory
    assert (sft[0].loss_type, sft[0].num_rollout) == ("sft_loss", 60)
    assert (grpo[0].advantage_estimator, grpo[0].num_rollout) == ("grpo", 7)
    assert grpo[0].hf_checkpoint == sft[0].save_hf
    assert grpo[0].use_routing_replay == (model == "qwen3-moe-tiny")
    assert (grpo[0].custom_reward_post_process_path is not None) == control


def test_each_demo_has_its_own_directory() -> None:
    names = {
        Demo(model=model, control=control, seed=seed).directory
        for model in MODELS
        for control in (False, True)
        for seed in (1, 2)
    }
    assert len(names) == 8 and Path("outputs/demo-seed1") in names


def test_the_models_have_scripts() -> None:
    assert [name for name in MODELS if not (ROOT / f"scripts/models/{name}.sh").exists()] == []


def test_wrong_flags_are_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = tmp_path / "outputs/demo-seed1/curves.png"
    before.parent.mkdir(parents=True)
    before.touch()
    for words, message in ((["--learning-rate", "1"], "did you mean --lr?"), (["again"], "'again'")):
        with pytest.raises(ValueError, match=re.escape(message)):
            main(words)
    assert before.exists(), "the last demo is still there"


def test_a_command_that_fails_shows_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def step(code: str) -> Step:
        return Step((sys.executable, "-S", "-c", code), tmp_path / "step.log")

    run_step(step("print(1); print(2)"))
    assert capsys.readouterr().out == "2\n"
    with pytest.raises(RunError, match=f"failed with status 3: .*; its whole output is in {tmp_path}/step.log"):
        run_step(step("print(1); print(2); raise SystemExit(3)"))
    assert capsys.readouterr().out == "1\n2\n"
