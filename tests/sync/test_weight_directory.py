"""The directory for weights on their way: one run's, never half-written, never full of what killed runs left."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime.sync.weight_directory import LOCK, WeightDirectory, remove_weights

OWN = ("weights-v000003", ".tmp_weights-v000004", ".tmp_old_weights-v000003", "weights-proof", "weights-v1234567")
OTHERS = ("weights", "weights-v3", "my-weights-v000003", "weights-v000003.bak", "iter_0000003")


def filled(directory: Path) -> Path:
    for name in (*OWN, *OTHERS):
        (directory / name).mkdir(parents=True)
        (directory / name / "model.safetensors").write_text("x")
    (directory / "weights-v000009").write_text("a file is not ours")
    return directory


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


def test_only_own_leftovers_are_removed(tmp_path: Path) -> None:
    remove_weights(filled(tmp_path), keep=tmp_path / "weights-v000003")
    assert names(tmp_path) == {*OTHERS, "weights-v000003", "weights-v000009"}


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    target = filled(tmp_path / "elsewhere")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "weights-v000001").symlink_to(target)
    remove_weights(tmp_path / "here")
    assert (target / "weights-proof" / "model.safetensors").exists()


def test_the_directory_begins_and_ends_empty(tmp_path: Path) -> None:
    directory = WeightDirectory(filled(tmp_path / "there"))
    assert names(directory.path) == {*OTHERS, "weights-v000009", LOCK}
    (directory.path / "weights-v000012").mkdir()
    directory.close()
    assert names(tmp_path / "there") == {*OTHERS, "weights-v000009"}


def test_a_directory_that_a_run_made_is_removed(tmp_path: Path) -> None:
    WeightDirectory(tmp_path / "made" / "here").close()
    assert names(tmp_path / "made") == set()


def test_two_runs_do_not_share_one(tmp_path: Path) -> None:
    first = WeightDirectory(tmp_path / "shared")
    (first.path / "weights-v000001").mkdir()
    with pytest.raises(ValueError, match=r"--update-weight-disk-dir .*shared: process \d+ on .* sends weights"):
        WeightDirectory(tmp_path / "shared")
    assert (first.path / "weights-v000001").exists(), "the other run's files are its own"
    first.close()
    WeightDirectory(tmp_path / "shared").close()
