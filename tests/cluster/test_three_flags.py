"""A whole run of three flags: a model, data and a reward. It leaves its result in a directory of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from slime.config.problem import UsageError
from slime.core.checkpoint_names import RUN_FILE, checkpoints_in
from slime.plan.fit import load_run
from slime.plan.summary import format_plan
from tests.cluster.runs import Task, events, train

pytestmark = [pytest.mark.usefixtures("joined_ray"), pytest.mark.timeout(900)]

CONTEXT = 32
"""A context that leaves some ten tokens for a response, so that 256 responses are soon there."""


@pytest.fixture(scope="module")
def words(task: Task, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("three")
    model = shutil.copytree(task.model, directory / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    data = directory / "train.jsonl"
    data.write_text("".join(task.train.read_text().splitlines(keepends=True)[:40]))
    return ["--hf-checkpoint", str(model), "--prompt-data", str(data), "--rm-type", "random"]


@pytest.fixture(scope="module")
def finished(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the current folder of a finished run."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "output.txt").write_text(train(words, folder / "log.txt", cwd=folder))
    return folder


def own_directory(finished: Path) -> Path:
    [directory] = (finished / "outputs").iterdir()
    return directory


def test_the_result_is_in_its_own_directory(finished: Path) -> None:
    directory = own_directory(finished)
    assert sorted(path.name for path in finished.iterdir()) == ["log.txt", "output.txt", "outputs"]
    assert {"args.yaml", "metrics.jsonl", "logs"} <= {path.name for path in directory.iterdir()}
    assert list(checkpoints_in(directory)) == [1], "one epoch of 40 prompts is two rollouts, and the last is saved"
    rewards = events(directory, "rollout/reward")
    assert sorted(rewards) == [1, 2] and len(set(rewards.values())) == 2
    assert max(events(directory, "train/grad_norm").values()) > 0
    assert f"{directory}, every 10 minutes and after the last" in (finished / "output.txt").read_text()


def test_it_resumes_with_its_own_arguments(words: list[str], finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    directory = own_directory(finished)
    args, problems = load_run(["--config", str(directory / "args.yaml"), "--load", str(directory), "--lr", "3e-6"])
    text = format_plan(args, problems)
    assert "continues after iter_0000001 with rollout 2" in text
    [changed] = [line for line in text.splitlines() if "changed since the checkpoint" in line]
    assert "--lr 1e-06 -> 3e-06" in changed
    with pytest.raises(UsageError, match=f"add --load {directory} to continue that run"):
        load_run(["--config", str(directory / "args.yaml")])
    assert [each.needs_directory for each in (args, load_run(words)[0])] == [False, True]
    assert own_directory(finished) == directory, "a plan makes no directory"


def test_what_it_was_trained_on_is_recorded(words: list[str], finished: Path, tmp_path: Path) -> None:
    """The rules compute the hashes of the data before anything starts; they equal those of the data buffer."""
    directory = own_directory(finished)
    record = json.loads((checkpoints_in(directory)[1] / RUN_FILE).read_text())
    assert record["data"]["--n-samples-per-prompt"] == 8 and record["flags"]["save"] == str(directory)
    load_run([*words, "--load", str(directory)])
    other = tmp_path / "other.jsonl"
    other.write_text(Path(words[3]).read_text().replace("+", "-", 1))
    for changed in (["--prompt-data", str(other)], ["--n-samples-per-prompt", "4"], ["--rollout-shuffle"]):
        with pytest.raises(UsageError, match=f"^1 problem with the arguments:\n  {changed[0]}"):
            load_run([*words, "--load", str(directory), *changed])
