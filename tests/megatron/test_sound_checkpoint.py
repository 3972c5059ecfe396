"""A checkpoint with changed bytes is noticed whatever the change is, and the run resumes from the one before."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up import STATE, Run, make_args
from worker_pool import WorkerPool, joined

import slime
from slime.config.args import Args
from slime.core.sample import Sample
from slime.core.sample_columns import from_columns, to_columns
from slime.megatron.checkpoint.files import find_checkpoint, refuse_abandoned, remove_old, why_incomplete
from slime.megatron.checkpoint.manifest import (
    STATE_FILE,
    _sum_of,
    changed_files,
    digest,
    read_state,
    sealed,
    written_files,
)
from slime.megatron.checkpoint.state_arrays import ARRAYS_FILE, put_back

pytestmark = pytest.mark.dist


def state_with_samples(rollout_id: int) -> dict[str, Any]:
    """Return a state as the driver gives it to rank 0; all rollouts' arrays have the same size."""
    tokens = list(range(rollout_id, rollout_id + 1000))
    group = [Sample(tokens=tokens, response="é", rollout_log_probs=[-0.5] * 900), Sample(metadata={"a": [1]})]
    return STATE | {"rollout": {"data_source": {"in_flight": to_columns([group])}}}


def save(rank: int, world_size: int, init_method: str, args: Args, rollouts: list[int]) -> None:
    with joined(args, rank, world_size, init_method) as topology:
        run = Run(args, topology)
        run.initialize()
        for rollout_id in rollouts:
            run.step(rollout_id)
            run.save(rollout_id, state_with_samples(rollout_id) if rank == 0 else {})


@pytest.fixture(scope="module")
def saved_once(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    workers.run(2, save, make_args(path, tp=2), [1, 2, 3])
    return path


@pytest.fixture
def saves(saved_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_once, tmp_path / "save"))


def found_by_each(
    rank: int, world_size: int, init_method: str, args: Args, path: Path, step: int | None, sets_aside: bool
) -> tuple[Any, list[str]]:
    """Return what `find_sound_checkpoint` finds, its warnings, and the rollout that is then loaded."""
    from slime.megatron.checkpoint.save_load import load_checkpoint
    from slime.megatron.checkpoint.search import find_sound_checkpoint
    from slime.observability.logs import collected_warnings

    with joined(args, rank, world_size, init_method) as topology, collected_warnings() as warnings:
        run = Run(args, topology)
        try:
            found = find_sound_checkpoint(path, step=step, sets_aside=sets_aside)
            assert found is not None and found.verified
            return load_checkpoint(found, model=run.model, optimizer=run.optimizer).rollout_id, warnings
        except ValueError as error:
            return str(error), warnings


def flip(file: Path, *places: int, bit: int = 4) -> None:
    content = bytearray(file.read_bytes())
    for place in places:
        content[place] ^= bit
    file.write_bytes(content)


def restored_by_each(
    rank: int, world_size: int, init_method: str, args: Args, path: Path
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the state that is loaded, and the files of the checkpoint that Python code opened to find and load it."""
    from slime.megatron.checkpoint.save_load import load_checkpoint
    from slime.megatron.checkpoint.search import find_sound_checkpoint

    opened: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and Path(str(arguments[0])).parent == path / "iter_0000003":
            opened.append(Path(str(arguments[0])).name)

    with joined(args, rank, world_size, init_method) as topology:
        run = Run(args, topology)
        sys.addaudithook(watch)  # there is no way to remove it
        try:
            found = find_sound_checkpoint(path, sets_aside=False)
            assert found is not None
            return load_checkpoint(found, model=run.model, optimizer=run.optimizer).state, opened
        finally:
            watching = False


def test_rank_zero_alone_reads_the_samples(workers: WorkerPool, saves: Path):
    """Their bytes are compared once. The library that reads them is not Python: its reading is not seen here."""
    (first, opened), (second, opened_by_other) = workers.run(2, restored_by_each, make_args(None, tp=2), saves)
    assert first is not None and second is not None
    assert opened.count(ARRAYS_FILE) == 1 and opened_by_other.count(ARRAYS_FILE) == 0
    assert STATE_FILE in opened_by_other, "control: it reads other files"
    columns = first["rollout"]["data_source"]["in_flight"]
    [[sample, other]] = from_columns(columns)
    assert (sample.tokens, sample.rollout_log_probs, sample.response) == ([*range(3, 1003)], [-0.5] * 900, "é")
    assert (other.tokens, other.metadata) == ([], {"a": [1]})
    assert set(second["rollout"]["data_source"]["in_flight"]["fields"]["tokens"]) == set(), "no array comes here"
    assert (saves / "iter_0000003" / STATE_FILE).stat().st_size < 5000


@pytest.mark.parametrize("damage", ["missing", "cut short", "flipped", "of rollout 2", "empty"])
def test_damaged_samples_are_noticed(workers: WorkerPool, saves: Path, damage: str):
    file = saves / "iter_0000003" / ARRAYS_FILE
    if damage == "missing":
        file.unlink()
    elif damage == "of rollout 2":
        other = saves / "iter_0000002" / ARRAYS_FILE
        assert other.stat().st_size == file.stat().st_size, "control: the size does not tell"
        shutil.copy(other, file)
    elif damage == "flipped":
        flip(file, file.stat().st_size - 1, bit=1)
    else:
        file.write_bytes(b"" if damage == "empty" else file.read_bytes()[:-1])
    why = why_incomplete(saves / "iter_0000003")
    assert (why is None) == (damage in ("flipped", "of rollout 2")), "found when the bytes are compared"
    assert why is None or ARRAYS_FILE in why
    assert remove_old(saves, 2, saved=3) == ([saves / "iter_0000001"] if why is None else [])
    if why is not None:
        found = find_checkpoint(saves)
        assert found is not None and found.rollout_id == 2
        return
    [(rollout_id, warned)] = workers.run(1, found_by_each, make_args(None), saves, None, False)
    assert rollout_id == 2 and any(f"iter_0000003: {ARRAYS_FILE}: not the bytes" in w for w in warned)


def test_samples_of_another_checkpoint_are_not_taken(saves: Path):
    """A file that the manifest does not name is no part of the checkpoint."""
    path = saves / "iter_0000003"
    state = read_state(path)
    del state["file_sizes"][ARRAYS_FILE]
    put_back(path, state)
    assert state["state"]["rollout"]["data_source"]["in_flight"]["fields"]["tokens"] == {}


def test_flips_that_cancel_each_other_are_noticed(saves: Path, tmp_path: Path):
    """One bit goes up, another in the same position of a word goes down. Control: format 1 does not notice it."""
    content = bytearray(np.random.default_rng(0).bytes(2**20))
    place = next(i for i in range(0, len(content), 8) if content[i] & 4 and not content[i + 8] & 4)
    (tmp_path / "file").write_bytes(content)
    before = _sum_of(tmp_path / "file"), digest(tmp_path / "file")
    flip(tmp_path / "file", place, place + 8)
    after = _sum_of(tmp_path / "file"), digest(tmp_path / "file")
    assert before[0] == after[0] and before[1] != after[1]
    flip(saves / "iter_0000003" / "__1_0.distcp", place, place + 8)
    names = written_files(saves / "iter_0000003")
    assert changed_files(saves / "iter_0000003", names) == {"__1_0.distcp": "not the bytes that were written"}


def test_each_change_gives_another_digest(tmp_path: Path):
    content = np.random.default_rng(0).bytes(5 * 2**19 + 3)
    block = 2**20
    exchanged = content[block : 2 * block] + content[:block] + content[2 * block :]
    zeroed = content[:4096] + bytes(512) + content[4608:]
    words = bytearray(content)
    words[0:8], words[8:16] = words[8:16], words[0:8]
    found: set[str] = set()
    for changed in (content, exchanged, zeroed, bytes(words), content[:-1], content[:-1] + b"!", content + b"!"):
        (tmp_path / "file").write_bytes(changed)
        found.add(digest(tmp_path / "file"))
    assert len(found) == 7


def test_the_digest_while_writing_is_the_files(saved_once: Path):
    state = read_state(saved_once / "iter_0000003")
    files = {path.name: digest(path) for path in (saved_once / "iter_0000003").iterdir() if path.name != STATE_FILE}
    assert state["file_digests"] == files and {"__0_0.distcp", "__1_0.distcp", ".metadata", "common.pt"} <= set(files)


def written_by(rank: int, world_size: int, init_method: str, file: Path, parts: list[bytes]) -> dict[str, str]:
    from slime.megatron.checkpoint.torch_dist import _DigestedFiles

    files = _DigestedFiles()
    with files.create_stream(file, "wb") as stream:
        for part in parts:
            stream.write(memoryview(part))
    return files.digests


def test_large_writes_are_digested_by_a_second_thread(workers: WorkerPool, tmp_path: Path):
    parts = [b"begin", np.random.default_rng(0).bytes(2**21), bytes(2**20), b"end"]
    [digests] = workers.run(1, written_by, tmp_path / "file", parts)
    assert (tmp_path / "file").read_bytes() == b"".join(parts)
    assert digests == {"file": digest(tmp_path / "file")}


def test_every_rank_takes_the_newest_sound_checkpoint(workers: WorkerPool, saves: Path):
    """Ranks check different files: only one of them sees the damage."""
    flip(saves / "iter_0000003" / "__1_0.distcp", 5000)
    (saves / "iter_0000002" / "common.pt").unlink()
    args = make_args(None, tp=2)
    (first, warned), (second, _) = workers.run(2, found_by_each, args, saves, None, False)
    assert first == second == 1
    assert any(
        f"skipping the damaged checkpoint {saves}/iter_0000003: __1_0.distcp: not the bytes" in w for w in warned
    )
    assert sorted(path.name for path in saves.glob("iter_*")) == [f"iter_000000{n}" for n in (1, 2, 3)]
    [(_, warned), _] = workers.run(2, found_by_each, args, saves, None, True)
    assert sorted(path.name for path in saves.glob("iter_*")) == [
        "iter_0000001",
        "iter_0000002.damaged",
        "iter_0000003.damaged",
    ]
    assert any(
        f"set aside as {saves}/iter_0000003.damaged; the run resumes from {saves}/iter_0000001" in w for w in warned
    )
    refuse_abandoned(saves, 2)
    assert remove_old(saves, 1, saved=1) == [] and (saves / "iter_0000003.damaged" / "__1_0.distcp").exists()
    # when the last sound checkpoint is lost, too, the rest is not an empty start
    shutil.rmtree(saves / "iter_0000001")
    with pytest.raises(ValueError, match=r"no complete checkpoint \(iter_0000002\.damaged: set aside; iter_0000003"):
        find_checkpoint(saves)


def test_a_damaged_named_checkpoint_is_an_error(workers: WorkerPool, saves: Path):
    for name in ("iter_0000002", "iter_0000003"):
        flip(saves / name / "__0_0.distcp", 1000)
    args = make_args(None)
    for path, step in ((saves, 2), (saves / "iter_0000003", None)):
        [(error, _)] = workers.run(1, found_by_each, args, path, step, True)
        assert "is damaged: __0_0.distcp: not the bytes that were written" in error
    [(rollout_id, _)] = workers.run(1, found_by_each, args, saves, 1, True)
    assert rollout_id == 1 and not list(saves.glob("*.damaged"))
    flip(saves / "iter_0000001" / "__0_0.distcp", 1000)
    [(error, _)] = workers.run(1, found_by_each, args, saves, None, True)
    assert "holds no complete checkpoint (iter_0000001: __0_0.distcp: not the bytes" in error
    assert not list(saves.glob("*.damaged"))


def test_the_suggested_command_lets_an_earlier_step_resume(saves: Path):
    with pytest.raises(
        ValueError, match="holds iter_0000002, iter_0000003, and this run starts at rollout 2"
    ) as caught:
        refuse_abandoned(saves, 2)
    command = str(caught.value).rpartition("move these away with: ")[2]
    subprocess.run(command, shell=True, check=True)
    refuse_abandoned(saves, 2)
    found = find_checkpoint(saves)
    assert found is not None and found.rollout_id == 1
    assert sorted(path.name for path in (saves / "abandoned").iterdir()) == ["iter_0000002", "iter_0000003"]


def as_format_1(path: Path) -> None:
    """Write the state file as the version before did."""
    state = read_state(path)
    sums = {name: _sum_of(path / name) for name in written_files(path)}
    old = {name: state[name] for name in ("rollout_id", "layout", "state", "file_sizes")} | {"file_checksums": sums}
    (path / STATE_FILE).write_text(json.dumps({**old, "checksum": zlib.crc32(json.dumps(old).encode())}))


def test_format_1_is_read_with_its_own_check(workers: WorkerPool, saves: Path):
    for number in (2, 3):
        as_format_1(saves / f"iter_000000{number}")
    [(rollout_id, _)] = workers.run(1, found_by_each, make_args(None), saves, None, False)
    assert rollout_id == 3
    flip(saves / "iter_0000003" / "__0_0.distcp", 1000)
    [(rollout_id, _)] = workers.run(1, found_by_each, make_args(None), saves, None, False)
    assert rollout_id == 2


def test_a_newer_format_is_refused_not_skipped(saves: Path):
    file = saves / "iter_0000003" / STATE_FILE
    file.write_text(sealed({**read_state(file.parent), "format": 4, "slime_version": "9.1"}))
    with pytest.raises(ValueError, match=rf"has format 4, .* slime \({slime.__version__}\) .* load it with slime 9\.1"):
        find_checkpoint(saves)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"{}", b"\xff\x00", b"[1]", b'{"checksum": {}}'])
def test_a_garbage_state_file_gives_a_reason(saves: Path, content: bytes, caplog: pytest.LogCaptureFixture):
    (saves / "iter_0000003" / STATE_FILE).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        found = find_checkpoint(saves)
    assert found is not None and found.rollout_id == 2
    assert why_incomplete(saves / "iter_0000003")


def test_a_garbled_metadata_json_is_a_clear_error(workers: WorkerPool, saves: Path):
    release = saves / "release"
    (saves / "iter_0000003").rename(release)
    (release / STATE_FILE).unlink()
    (release / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    args = replace(make_args(None))
    [(error, _)] = workers.run(1, found_by_each, args, release, None, False)
    assert f"{release}/metadata.json: the format is 'zarr'" in error
