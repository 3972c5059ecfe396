"""No run mixes its checkpoints with another's or continues with other data, and each refusal comes before the start."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from config_run import Run

from slime.config.resuming import changed_flags, hashes_of, record_of_run, resumed_checkpoint
from slime.core.checkpoint_names import METADATA, RUN_FILE, checkpoints_in, iteration_name
from slime.plan.summary import format_plan


def checkpoint(folder: Path, rollout_id: int, record: Mapping[str, Any] | None = None) -> Path:
    """Make what the rules see of a checkpoint."""
    path = folder / iteration_name(rollout_id)
    path.mkdir(parents=True)
    (path / METADATA).write_text("")
    if record is not None:
        (path / RUN_FILE).write_text(json.dumps(record))
    return path


def record(run: Run, *more: str) -> dict[str, Any]:
    """Return what a run with these flags leaves in its checkpoints."""
    args = run.args(*more)
    hashes = hashes_of(args)
    assert hashes is not None
    flags = {
        "--rollout-shuffle": args.rollout_shuffle,
        "--rollout-seed": args.rollout_seed,
        "--n-samples-per-prompt": args.n_samples_per_prompt,
    }
    return record_of_run(args, {**hashes, "number of prompts": 1, **flags})


@pytest.mark.parametrize("planned", [[], ["--dry-run"]])
def test_another_runs_checkpoints_are_refused(run: Run, planned: list[str]) -> None:
    save = run.directory / "my runs"
    checkpoint(save, 3), checkpoint(save, 12)
    error = run.error("--save", str(save), *planned)
    assert error == (
        f"--save {save}: it has checkpoints of an earlier run, up to iter_0000012, and without --load this run would "
        f"start at rollout 0; add --load '{save}' to continue that run, or name another directory"
    )
    resumes = error.split("; ")[1].partition(" to continue")[0]
    assert run.errors("--save", str(save), *shlex.split(resumes)[1:], *planned) == [], "the line is exact"


def test_what_may_be_saved_there(run: Run) -> None:
    save, other = run.directory / "save", run.directory / "other"
    assert run.errors("--save", str(save)) == []
    (save / "logs").mkdir(parents=True)
    (save / iteration_name(7)).mkdir()  # a leftover without a checkpoint in it
    assert run.errors("--save", str(save)) == []
    checkpoint(save, 3)
    assert run.errors("--save", str(save), "--save-interval", "0") == [], "nothing is saved"
    assert run.errors("--save", str(save), "--load", str(save)) == []
    link = run.directory / "link"
    link.symlink_to(save)
    assert run.errors("--save", str(save), "--load", str(link)) == []
    checkpoint(other, 2)
    assert "start at rollout 3: a resume would mix the two" in run.error("--save", str(save), "--load", str(other))
    checkpoint(other, 3)
    assert run.errors("--save", str(save), "--load", str(other)) == [], "all that follows is newer"
    assert "start at rollout 0" in run.error("--save", str(save), "--load", str(other), "--finetune")
    checkpoint(save, 5)
    assert "start at rollout 4" in run.error("--save", str(save), "--load", str(save), "--ckpt-step", "3")
    assert run.errors("--save", str(other), "--load", str(save / iteration_name(5))) == []
    assert "start at rollout 0" in run.error("--save", str(save), "--load", str(run.directory / "missing"))


def test_other_data_are_refused_before_the_start(run: Run) -> None:
    save = run.directory / "save"
    path = checkpoint(save, 3, record(run))
    resume = ("--save", str(save), "--load", str(save))
    assert run.errors(*resume) == []
    before = run.data.read_text()
    moved = run.directory / "moved.jsonl"
    run.data.rename(moved)
    assert run.errors(*resume, "--prompt-data", str(moved)) == [], "files may move"
    for changed, named in (
        (before.replace("1 + 1", "1 + 2"), "the data are not those"),
        (before.replace('"label"', '"extra": 1, "label"'), "the other columns are not those"),
        (before + before, "the data and the other columns are not those"),
    ):
        run.data.write_text(changed)
        for more in ([], ["--dry-run"]):
            error = run.error(*resume, *more)
            assert error.startswith(f"--prompt-data {run.data}: {named} with which {path} was written")
            assert error.endswith("or start a new run from these weights: --finetune, and another --save")
        assert run.errors("--save", f"{save}-2", "--load", str(save), "--finetune") == []
        assert run.errors(*resume, "--num-rollout", "0", "--eval-prompt-data", str(run.data)) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--n-samples-per-prompt 4", "--n-samples-per-prompt 4: is 4, but {path} was written with 2"),
        ("--rollout-shuffle", "--rollout-shuffle: is True, but {path} was written with False"),
        ("--rollout-seed 7", "--rollout-seed 7: is 7, but {path} was written with 42"),
        ("--prompt-data-weights 2", "--prompt-data-weights 2.0: {path} was written with other weights (unset)"),
    ],
)
def test_flags_of_the_order_are_refused(run: Run, words: str, message: str) -> None:
    path = checkpoint(run.directory / "save", 3, record(run))
    error = run.error("--load", str(path.parent), *words.split())
    assert error.startswith(message.format(path=path))


def test_weights_are_compared_with_the_checkpoints(run: Run) -> None:
    weighed = ("--prompt-data-weights", "0.5")
    path = checkpoint(run.directory / "save", 3, record(run, *weighed))
    assert run.errors("--load", str(path.parent), *weighed) == []
    error = run.error("--load", str(path.parent))
    assert error.startswith(f"--prompt-data-weights: {path} was written with other weights (0.5)")


def test_changed_flags_are_listed(run: Run) -> None:
    save = run.directory / "save"
    checkpoint(save, 1, record(run, "--lr", "1e-6"))
    path = checkpoint(save, 3, record(run, "--lr", "2e-6", "--save", "elsewhere"))
    same = run.args("--load", str(save), "--lr", "2e-6", "--save", str(save))
    assert "no flag has changed since the checkpoint" in format_plan(same, [])
    words = ("--load", str(save), "--save", str(save), "--lr", "5e-7", "--num-rollout", "9", "--balance-data")
    text = format_plan(run.args(*words), [])
    assert "continues after iter_0000003 with rollout 4" in text
    assert "changed since the checkpoint: --num-rollout 3 -> 9, --balance-data off -> on, --lr 2e-06 -> 5e-07" in text
    chosen = resumed_checkpoint(run.args(*words[:2], "--ckpt-step", "1"))
    assert chosen is not None and changed_flags(run.args(), chosen) == []
    (path / RUN_FILE).write_text("{")  # damaged: loading refuses the checkpoint, and takes the one before
    assert "changed since" not in format_plan(run.args(*words), [])


def test_a_checkpoint_without_the_file_resumes(run: Run) -> None:
    """Checkpoints of earlier versions have none; their data are compared when they are loaded."""
    save = run.directory / "save"
    checkpoint(save, 3)
    assert run.errors("--load", str(save), "--n-samples-per-prompt", "4") == []
    assert checkpoints_in(save) == {3: save / iteration_name(3)} and checkpoints_in("/nowhere") == {}


def test_an_unusable_place_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.directory)
    (run.directory / "outputs").write_text("")
    error = run.error()
    assert error == (
        f"--save: not given, and no directory can be made under outputs/: {run.directory}/outputs is a file; name a "
        "directory that you can write to"
    )
    assert run.errors("--save", "elsewhere") == []
    assert run.warnings("--dry-run") == [error]
    (run.directory / "outputs").unlink()
    if os.getuid():  # root may write anywhere
        (run.directory / "outputs").mkdir(mode=0o500)
        assert "outputs is not writable" in run.error()
    assert run.errors("--save", "/tmp/whole") == []


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".hidden", "x" * 101, "a b", "-x"])
def test_a_name_is_no_path(run: Run, name: str) -> None:
    assert run.error(f"--run-name={name}").startswith(f"--run-name {name}".strip())
    assert run.errors("--run-name", "qwen2.5-0.5B_lr-1e-6") == []


def test_a_name_without_use(run: Run) -> None:
    [warning] = run.warnings("--run-name", "x", "--save", "out")
    assert warning.startswith("--run-name x: no effect: it names the directory of a run without --save")
