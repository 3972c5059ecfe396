"""A model, data and a reward are a whole run: each default, and what is refused because no default can be right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_run import Run

from slime.config.args import Args
from slime.config.args_yaml import dump_args
from slime.config.data_defaults import data_defaults
from slime.config.resolve import in_directory
from slime.plan.summary import format_plan

ASYNC = 1


@pytest.fixture
def three(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Three flags, in an empty current folder, on a machine without GPUs and with no Ray to join."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    empty = run.directory / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    words = ["--hf-checkpoint", str(run.hf), "--prompt-data", str(run.data), "--rm-type", "deepscaler"]
    return replace(run, base=words)


def write(run: Run, *rows: dict[str, Any]) -> None:
    run.data.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_three_flags_are_a_run(three: Run) -> None:
    args, problems = three.load()
    assert [str(problem) for problem in problems] == []
    assert (args.ref_load, args.num_epoch, args.num_rollout) == (str(three.hf), 1, None)
    assert (args.n_samples_per_prompt, args.rollout_batch_size, args.global_batch_size) == (8, 32, 256)
    assert (args.colocate, args.offload, args.rollout_num_gpus, args.num_engines) == (True, True, 1, 1)
    assert (args.input_key, args.label_key, args.apply_chat_template) == ("prompt", "label", True)
    assert (args.save_interval, args.save_interval_minutes, args.keep_last_checkpoints) == (None, 10.0, 2)
    assert args.needs_directory and (args.save, args.log_dir) == (None, None)


def test_a_plan_makes_no_directory(three: Run) -> None:
    args, problems = three.load("--dry-run")
    text = format_plan(args, problems)
    assert "outputs/TIME/, which the run makes, every 10 minutes and after the last; the newest 2 are kept" in text
    assert "training and generation share these devices; for their own, give --rollout-num-gpus N" in text
    assert "outputs/mine/" in format_plan(three.args("--dry-run", "--run-name", "mine"), [])
    assert not any(Path().iterdir())


def test_the_own_directory_fills_all_paths(three: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    args = in_directory(three.args("--use-tensorboard", "--use-wandb", "--run-name", "mine"), "/out")
    assert (args.save, args.log_dir, args.update_weight_disk_dir) == ("/out", "/out", "/out/engine-weights")
    assert (args.tensorboard_dir, args.wandb_exp_name) == ("/out/tensorboard", "mine")
    evaluates = in_directory(three.args("--num-rollout", "0", "--eval-prompt-data", str(three.data)), "/out")
    assert (evaluates.save, evaluates.log_dir) == (None, "/out"), "it saves no checkpoint"
    generates = in_directory(three.args("--debug-rollout-only"), "/out")
    assert (generates.save, generates.log_dir) == (None, "/out")
    logs = in_directory(three.args("--log-dir", "/logs"), "/out")
    assert (logs.save, logs.log_dir) == ("/out", "/logs")


def test_args_yaml_gives_the_same_run(three: Run) -> None:
    """args.yaml holds the directory and the times of saves, and nothing in it counts as given without need."""
    args = in_directory(three.args(), str(three.directory / "out"))
    path = three.directory / "args.yaml"
    path.write_text(dump_args(args))
    again, problems = replace(three, base=["--config", str(path)]).load()
    assert (again, problems) == (replace(args, config=str(path)), [])


def test_an_explicit_directory_keeps_its_meaning(three: Run) -> None:
    args = three.args("--save", "out")
    assert (args.save, args.log_dir, args.needs_directory) == ("out", "out", False)
    assert (args.save_interval, args.save_interval_minutes, args.keep_last_checkpoints) == (None, None, None)
    assert three.args("--save-interval", "5").save_interval_minutes is None, "by number or by the clock"
    assert "out, every 30 minutes and after the last" in format_plan(
        three.args("--save", "out", "--save-interval-minutes", "30"), []
    )


def test_nothing_is_saved_on_request(three: Run) -> None:
    off = three.args("--save-interval", "0")
    assert (off.saves, off.needs_directory, off.save_interval_minutes, off.keep_last_checkpoints) == (
        *(False, True),
        *(None, None),
    )
    assert "no checkpoint (--save-interval 0)" in format_plan(off, [])
    assert not three.args("--save-interval", "0", "--log-dir", "logs").needs_directory
    [warning] = three.warnings("--save-interval", "0", "--keep-last-checkpoints", "3")
    assert "no effect: --save-interval 0 saves no checkpoint" in warning
    assert "--save-interval 0 saves no checkpoint" in three.error("--no-save")


def test_the_reference_is_never_a_fallback(three: Run) -> None:
    assert three.error("--ref-load", "/nowhere", "--use-kl-loss", "--kl-loss-coef", "0.1").startswith(
        "--ref-load /nowhere: there is no such directory"
    )
    assert three.args("--use-kl-loss", "--kl-loss-coef", "0.1").ref_load == str(three.hf)
    [error] = three.errors("--hf-checkpoint", "/nowhere")
    assert error.startswith("--hf-checkpoint /nowhere: there is no config.json")
    assert "the teacher is loaded from it" in three.error("--advantage-estimator", "on_policy_distillation")


@pytest.mark.parametrize(
    ("estimator", "size"),
    [
        ("grpo", 8),
        ("gspo", 8),
        ("rloo", 8),
        ("reinforce_plus_plus_baseline", 8),
        ("reinforce_plus_plus", 1),
        ("ppo", 1),
    ],
)
def test_the_group_follows_the_estimator(three: Run, estimator: str, size: int) -> None:
    assert three.args("--advantage-estimator", estimator).n_samples_per_prompt == size
    if size > 1:
        assert "there is only one" in three.error("--advantage-estimator", estimator, "--n-samples-per-prompt", "1")


def test_devices_are_shared_on_small_machines(three: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of GPUs is the only thing that is pretended here."""
    for count, shared in ((0, True), (1, True), (2, False), (8, False)):
        monkeypatch.setattr("slime.config.resolve.cuda_devices", lambda count=count: count)
        monkeypatch.setattr("slime.config.rules.engines.cuda_devices", lambda count=count: count)
        if shared:
            assert three.args().colocate is True
        else:
            assert three.error() == (
                f"--rollout-num-gpus: not given, nor --colocate, and this machine has {count} GPUs; add --colocate to "
                "share the training GPUs, or give the number of GPUs for generation"
            )
        assert three.args("--rollout-num-gpus", "1").colocate is False
        assert three.args("--colocate").num_engines == 1
    assert "with --no-colocate; give their number" in three.error("--no-colocate")
    ahead = replace(three, rollouts_ahead=ASYNC)
    assert "train_async.py needs engines on devices of their own; give their number" in ahead.error()


def test_a_run_that_generates_nothing_starts_no_engine(three: Run) -> None:
    words = ["--loss-type", "sft_loss", "--rollout-function-path", "slime.rollout.sft_rollout.generate_rollout"]
    args = three.args(*words, "--label-key", "label")
    assert (args.colocate, args.rollout_num_gpus, args.n_samples_per_prompt) == (False, 0, 1)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"prompt": "1 + 1 = ?", "label": "2"}, ("prompt", "label", False)),
        ({"question": "1 + 1 = ?", "answer": "so\n#### 2"}, ("question", "answer", False)),
        ({"problem": "1 + 1 = ?", "solution": "2"}, ("problem", "solution", False)),
        ({"messages": [{"role": "user", "content": "1 + 1 = ?"}], "answer": "2"}, ("messages", "answer", True)),
        (
            {"prompt": [{"role": "user", "content": "?"}], "reward_model": {"style": "rule", "ground_truth": "2"}},
            ("prompt", "reward_model.ground_truth", True),
        ),
        ({"prompt": "?", "question": "??", "label": [1], "answer": "2"}, ("prompt", "answer", False)),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_keys_come_from_the_first_row(
    three: Run, row: dict[str, Any], found: tuple[str, str, bool], suffix: str, tmp_path: Path
) -> None:
    data = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist([row]), data)
    else:
        data.write_text(json.dumps(row) + "\n")
    args = three.args("--prompt-data", str(data))
    assert (args.input_key, args.label_key, args.apply_chat_template) == found
    given = Args(prompt_data=str(data), rm_type="math", input_key="x", label_key="y", apply_chat_template=False)
    assert data_defaults(given) == {}, "a given flag is never replaced"


def test_an_answered_conversation_is_no_prompt(three: Run) -> None:
    """The policy would continue the answer of the data, in silence."""
    turns = [{"role": "user", "content": "1 + 1 = ?"}, {"role": "assistant", "content": "2"}]
    write(three, {"messages": turns, "label": "2"})
    assert "no key 'prompt'; it has messages, label" in three.error()
    assert three.args("--input-key", "messages").apply_chat_template is True


def test_no_label_is_invented(three: Run) -> None:
    write(three, {"prompt": "1 + 1 = ?", "text": "2"})
    assert "no key 'label'; it has prompt, text" in three.error()
    assert three.args("--rm-type", "random").label_key is None
    own = Args(prompt_data=str(three.data), custom_rm_path="my.reward")
    assert data_defaults(own)["label_key"] is None
    write(three, {"prompt": "1 + 1 = ?", "solution": "2"})
    assert data_defaults(own)["label_key"] == "solution"


def test_each_run_of_an_epoch_needs_data(three: Run) -> None:
    replayed = ["--debug-train-only", "--load-debug-rollout-data", "none/{rollout_id}", "--dry-run"]
    assert "give --num-rollout or --num-epoch" in "\n".join(three.errors(*replayed))
    assert three.args(*replayed, "--num-rollout", "1").num_epoch is None


def test_an_earlier_number_is_taken_back(run: Run) -> None:
    """The base command line gives --rollout-num-gpus 2, as a script would; the last of several wins."""
    shares = ("--colocate", "--actor-num-gpus-per-node", "2")
    assert "append --no-rollout-num-gpus, which takes it back" in run.error(*shares)
    assert run.args(*shares, "--no-rollout-num-gpus").rollout_num_gpus == 2
    again = (*shares, "--no-rollout-num-gpus", "--rollout-num-gpus", "1")
    assert "--rollout-num-gpus 1: --colocate shares" in run.error(*again)
    assert "engines on further GPUs are not part of this version" in run.error(*shares, "--rollout-num-gpus", "4")
    assert run.args("--colocate", "--no-colocate").rollout_num_gpus == 2
    config = run.directory / "run.yaml"
    config.write_text(yaml.safe_dump({"rollout_num_gpus": 3, "eval_prompt_data": ["x", str(run.data)]}))
    bare = replace(run, base=["--config", str(config), *run.base])
    assert bare.args(*shares, "--no-rollout-num-gpus", "--no-eval-prompt-data").eval_prompt_data == ()
    assert "--no-rollout-num-gpus 2: takes no value" in run.error("--no-rollout-num-gpus", "2")
    assert "unknown flag" in run.error("--no-rollout-batch-size"), "it always has a value"


def test_an_unknown_model_is_one_line(three: Run) -> None:
    warnings = three.warnings("--hf-checkpoint", "/nowhere", "--dry-run")
    assert warnings == [
        "--hf-checkpoint /nowhere: there is no config.json, so the plan has no model and no estimate of memory; "
        "download it (`hf download MODEL --local-dir DIR`), or append MODEL_ARGS of scripts/models"
    ]
