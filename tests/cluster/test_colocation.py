"""A whole run with --colocate trains like one with separate devices, by turns on the same ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slime.observability.phases import MEASURED
from tests.cluster.runs import Task, events, flags, train

pytestmark = pytest.mark.usefixtures("joined_ray")

ROLLOUTS = ("--num-rollout", "2")


def colocated(arguments: list[str]) -> list[str]:
    at = arguments.index("--rollout-num-gpus")
    return [*arguments[:at], *arguments[at + 2 :], "--colocate"]


def weights(hf: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in hf.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def run(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("colocated")
    evaluation = ("--eval-prompt-data", f"{task.eval}@[0:4]", "--eval-interval", "2")
    arguments = flags(
        task, directory, "--save-hf", str(directory / "hf"), *evaluation, "--update-weight-buffer-size", "300000",
        length=ROLLOUTS,
    )  # fmt: skip
    (directory / "output.txt").write_text(train(colocated(arguments), directory.parent / "colocated.txt"))
    return directory


def test_it_trains_as_apart_to_the_bit(task: Task, run: Path, tmp_path: Path) -> None:
    """The first sync was proven by checksum, or the run had ended; later ones are proven by the policy version."""
    apart = tmp_path / "apart"
    train(flags(task, apart, "--save-hf", str(apart / "hf"), length=ROLLOUTS), tmp_path / "apart.txt")
    found, expected = weights(run / "hf"), weights(apart / "hf")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    start_of_run = weights(task.model)
    assert not all(torch.equal(found[name], start_of_run[name]) for name in found), "it has learned"


def test_policies_agree_and_phases_report_memory(run: Path) -> None:
    assert len(events(run, "train/logprob_gap_mean")) == 2
    assert max(events(run, "train/logprob_gap_max").values()) <= 1e-4
    assert all(seconds > 0 for seconds in events(run, "time/offload").values())
    for phase in MEASURED:
        peaks = events(run, f"memory/{phase}_peak_gb")
        assert peaks and all(0.05 < peak < 8 for peak in peaks.values()), phase
    assert "GB at most: generation" in (run / "output.txt").read_text()
