"""The closing lines of each kind of run."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slime.cli import export, plot
from slime.cluster.life.ending import Outcome, closing_lines
from slime.config.args import Args

TIMES = {"time/generation": 50.0, "time/training": 30.0, "time/weight_sync": 0.5, "time/idle": 0.0}


def outcome(save: Path | None, **changes: Any) -> Outcome:
    saved = None if save is None else str(save / "iter_0000005")
    made = Outcome(first=0, done=6, total=6, seconds=100.0, times=TIMES, saved=saved, loaded="models/hf")
    return replace(made, **changes)


def run_args(directory: Path, **flags: Any) -> Args:
    return Args(log_dir=str(directory), hf_checkpoint="models/a model", **flags)


def write(directory: Path, *events: dict[str, float]) -> None:
    (directory / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def evaluations(*rewards: float, name: str = "aime") -> list[dict[str, float]]:
    return [{"step": step, f"eval/{name}/reward": reward} for step, reward in enumerate(rewards)]


def test_a_saved_run_names_model_and_commands(tmp_path: Path) -> None:
    save = tmp_path / "my run"
    write(tmp_path, *evaluations(0.1, 0.7, 0.5))
    lines = closing_lines(run_args(tmp_path, save=str(save)), outcome(save))
    assert lines[:3] == [
        "done: 6/6 rollouts in 1 min 40 s: start and end 20%, generation 50%, training 30%",
        f"model: {save}/iter_0000005",
        "eval aime: 0.100 -> 0.500 after 2 rollouts, best 0.700 after 1 rollout",
    ]
    assert lines[3] == f"next: slime plot {tmp_path}/metrics.jsonl"
    words = shlex.split(lines[4].removeprefix("next: "))
    assert words[:6] == ["slime", "export", "--input-dir", f"{save}/iter_0000005", "--origin-hf-dir", "models/a model"]
    assert words[6:] == ["--output-dir", f"{save}/hf"]
    (save / "hf").mkdir(parents=True)
    assert closing_lines(run_args(tmp_path, save=str(save)), outcome(save))[4].endswith("/hf-2'"), "nothing is replaced"


def test_commands_parse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both commands get as far as looking at their files."""
    write(tmp_path, *evaluations(0.1, 0.7))
    *_, first, second = closing_lines(run_args(tmp_path, save=str(tmp_path / "run")), outcome(tmp_path / "run"))
    plot.main(shlex.split(first)[3:])
    assert (tmp_path / "curves.png").exists()
    with pytest.raises((ValueError, SystemExit, OSError), match="models/a model"):
        export.main(shlex.split(second)[3:])


def test_lost_weights_are_told(tmp_path: Path) -> None:
    write(tmp_path, {"step": 1, "rollout/reward": 0.25}, {"step": 6, "rollout/reward": -0.0001})
    lines = closing_lines(run_args(tmp_path), outcome(None))
    assert lines[1] == "WARNING nothing was saved: the trained weights are lost; --save-interval 0 saves no checkpoint"
    assert lines[2] == "reward of the samples: 0.250 in rollout 0 -> 0.000 in rollout 5"
    assert not [line for line in lines if "export" in line or "answers" in line]
    saved = closing_lines(run_args(tmp_path, save="x"), outcome(Path("x")))
    assert not [line for line in saved if "weights are lost" in line], "control"


def test_an_exported_run_compares_answers(tmp_path: Path) -> None:
    write(tmp_path, *evaluations(0.1, 0.7))
    flags = {"save": "runs/a", "save_hf": "runs/hf-{rollout_id}", "eval_prompt_data": ("data/eval.jsonl@[0:8]",)}
    args = resolved(tmp_path, **flags, eval_input_key="prompt", eval_label_key="label")
    lines = closing_lines(args, outcome(Path("runs/a")))
    assert lines[1] == "model: runs/a/iter_0000005  Hugging Face: runs/hf-5"
    assert lines[2] == "eval aime: 0.100 -> 0.700 after 1 rollout, the best"
    assert lines[-1] == (
        "next: slime answers --before 'models/a model' --after runs/hf-5 --prompt-data data/eval.jsonl"
    )
    other = resolved(tmp_path, **flags, eval_input_key="question", eval_label_key="label")
    assert "answers" not in closing_lines(other, outcome(Path("runs/a")))[-1], "that command reads other keys"


def resolved(directory: Path, **flags: Any) -> Args:
    return run_args(directory, **flags, **{f"eval_{name}": 1 for name in ("max_response_len", "temperature", "top_p")})


def test_an_evaluation_alone_has_no_training(tmp_path: Path) -> None:
    write(tmp_path, *evaluations(0.3))
    lines = closing_lines(run_args(tmp_path), outcome(None, done=0, total=0, times={"time/evaluation": 60.0}))
    assert lines == [
        "done: evaluated in 1 min 40 s: start and end 40%, evaluation 60%",
        "model: models/hf",
        "eval aime: 0.300 after 0 rollouts",
    ]


def test_a_run_without_trainers_says_so(tmp_path: Path) -> None:
    write(tmp_path, {"step": 1, "rollout/reward": 0.25})
    lines = closing_lines(run_args(tmp_path, debug_rollout_only=True), outcome(None, loaded=None))
    assert lines[0].startswith("done: 6/6 rollouts generated, nothing was trained (--debug-rollout-only), in 1 min")
    assert not [line for line in lines if "are lost" in line or "model" in line]
    assert lines[-1] == f"next: slime plot {tmp_path}/metrics.jsonl"


def test_supervised_training_shows_its_loss(tmp_path: Path) -> None:
    write(tmp_path, {"step": 1, "train/loss": 3.9}, {"step": 6, "train/loss": 0.2})
    lines = closing_lines(run_args(tmp_path, loss_type="sft_loss", save="x"), outcome(Path("x")))
    assert lines[2] == "loss: 3.900 in rollout 0 -> 0.200 in rollout 5"
    write(tmp_path, *[{"step": step, "eval/held/loss": loss} for step, loss in ((0, 3.0), (3, 0.5), (6, 0.7))])
    lines = closing_lines(run_args(tmp_path, loss_type="sft_loss", save="x"), outcome(Path("x")))
    assert lines[2] == "eval held loss: 3.000 -> 0.700 after 6 rollouts, best 0.500 after 3 rollouts"


def test_resumed_runs_count_all_rollouts(tmp_path: Path) -> None:
    write(tmp_path, *evaluations(float("nan"), 0.7, 0.7, 0.6))
    args = run_args(tmp_path, save="x")
    lines = closing_lines(args, outcome(Path("x"), first=4))
    assert lines[0].startswith("done: 6/6 rollouts (2 of them now) in ")
    assert lines[2] == "eval aime: nan -> 0.600 after 3 rollouts, best 0.700 after 1 rollout"
    assert closing_lines(args, outcome(Path("x"), done=5))[0].startswith("stopped after 5/6 rollouts in ")
    nothing = closing_lines(args, outcome(None, first=6))
    assert nothing[1] == "model: models/hf (nothing was trained now)"


def test_many_sets_and_a_damaged_file(tmp_path: Path) -> None:
    write(tmp_path, *[event for name in "abcdef" for event in evaluations(0.1, 0.2, name=name)])
    lines = closing_lines(run_args(tmp_path, save="x"), outcome(Path("x")))
    assert [line[:6] for line in lines[2:5]] == ["eval a", "eval b", "eval c"]
    assert lines[5] == "and 3 more data sets, in metrics.jsonl"
    (tmp_path / "metrics.jsonl").write_text("{broken\n")
    assert closing_lines(run_args(tmp_path, save="x"), outcome(Path("x")))[1] == "model: x/iter_0000005"
