"""torch_dist checkpoints: they resume bit for bit, at any layout, and only if they are complete."""

from __future__ import annotations

import json
import logging
import random
import re
import resource
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import GLM4, STATE, Run, make_args, same_bits
from torch import Tensor
from worker_pool import WorkerPool, joined

from slime.config.args import Args
from slime.megatron.checkpoint.files import TRACKER, FoundCheckpoint, find_checkpoint, remove_old
from slime.megatron.checkpoint.manifest import STATE_FILE
from slime.observability.best_checkpoint import BestCheckpoint

pytestmark = pytest.mark.dist


def trained(rank: int, world_size: int, init_method: str, args: Args, steps: int, more: int) -> Any:
    """Take `steps` steps, save, take `more` steps; return the weights at both places and draws in between."""
    with joined(args, rank, world_size, init_method) as topology:
        random.seed(rank)
        np.random.seed(rank)
        run = Run(args, topology)
        run.initialize()
        for number in range(steps):
            run.step(number)
        run.draws()
        run.save(steps)
        at_save, draws = run.weights(), run.draws()
        for number in range(steps, steps + more):
            run.step(number)
        return at_save, draws, run.weights()


def resumed(rank: int, world_size: int, init_method: str, args: Args, path: Path, steps: int, more: int) -> Any:
    """Return what `trained` returns, beginning from its checkpoint, and the LoadedCheckpoint."""
    with joined(args, rank, world_size, init_method) as topology:
        run = Run(args, topology)
        result = run.load(path, optimizer=not args.no_load_optim, rng=not args.no_load_rng)
        at_load, draws = run.weights(), run.draws()
        for number in range(steps, steps + more):
            run.step(number)
        return at_load, draws, run.weights(), result


@pytest.mark.parametrize(("bf16", "tied"), [(False, False), (True, False), (True, True)])
def test_resume_is_bit_exact(workers: WorkerPool, tmp_path: Path, bf16: bool, tied: bool):
    args = replace(make_args(tmp_path, tp=2, bf16=bf16), architecture=replace(GLM4, tied_embeddings=tied))
    before = workers.run(2, trained, args, 2, 2)
    after = workers.run(2, resumed, args, tmp_path, 2, 2)
    for (at_save, draws, end, *_), (at_load, draws_again, end_again, result) in zip(before, after, strict=True):
        assert same_bits(at_load, at_save)
        assert draws_again == draws
        assert same_bits(end_again, end)
        assert result.rollout_id == 2
        assert result.loaded == ("model", "optimizer", "scheduler", "rng")
        assert json.dumps(result.state) == json.dumps(STATE)
    assert (tmp_path / TRACKER).read_text() == "2"
    assert before[0][1] != before[1][1], "ranks draw for themselves"
    # Controls: a part that is not loaded makes a difference.
    fresh = workers.run(2, resumed, replace(args, no_load_optim=True), tmp_path, 2, 2)
    assert same_bits(fresh[0][0], before[0][0]) and not same_bits(fresh[0][2], before[0][2])
    unseeded = workers.run(2, resumed, replace(args, no_load_rng=True), tmp_path, 2, 2)
    assert same_bits(unseeded[0][2], before[0][2]) and unseeded[0][1] != before[0][1]


@dataclass(frozen=True)
class Layout:
    """A parallel layout; `sharded` means with the distributed optimizer."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sharded: bool = False

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def args(self, save: Path, **changes: Any) -> Args:
        changes["use_distributed_optimizer"] = self.sharded
        return make_args(save, self.tp, pipeline_model_parallel_size=self.pp, **changes)

    def __str__(self) -> str:
        return f"TP{self.tp} PP{self.pp} DP{self.dp}" + " sharded" * self.sharded


ONE, TP, PP, DP = Layout(), Layout(tp=2), Layout(pp=2), Layout(dp=2)
SHARDED_DP, SHARDED_TP_DP, SHARDED_PP_DP = Layout(dp=2, sharded=True), Layout(2, 1, 2, True), Layout(1, 2, 2, True)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (TP, ONE),
        (ONE, TP),
        (DP, TP),
        (TP, DP),
        (SHARDED_DP, ONE),
        (TP, SHARDED_DP),
        (SHARDED_DP, SHARDED_TP_DP),
        (SHARDED_TP_DP, PP),
        (PP, SHARDED_PP_DP),
    ],
    ids=str,
)
def test_any_layout_loads_what_any_other_saved(workers: WorkerPool, tmp_path: Path, saved: Layout, loaded: Layout):
    """In bf16 the weights alone would give a different next step: the fp32 weights come from the checkpoint."""
    bf16 = saved.sharded or loaded.sharded
    args = saved.args(tmp_path, bf16=bf16)
    at_save, _, end = workers.run(saved.world_size, trained, args, 2, 1)[0]
    args = loaded.args(tmp_path, bf16=bf16)
    at_load, _, end_again, result = workers.run(loaded.world_size, resumed, args, tmp_path, 2, 1)[0]
    assert same_bits(at_load, at_save)
    assert same_bits(end_again, end)
    assert not same_bits(end, at_save)
    assert result.loaded == ("model", "optimizer", "scheduler"), "RNG states belong to a layout"


@pytest.mark.parametrize(
    ("saved", "saved_bf16", "loaded"),
    [(TP, True, SHARDED_DP), (SHARDED_DP, True, ONE), (ONE, False, SHARDED_DP)],
    ids=str,
)
def test_the_main_weights_survive_a_change_of_dtype(
    workers: WorkerPool, tmp_path: Path, saved: Layout, saved_bf16: bool, loaded: Layout
):
    """Gradients are fp32 in both runs, so the unbroken run's next step in fp32 equals the resumed one's."""
    args = saved.args(tmp_path, bf16=saved_bf16)
    at_save, _, end = workers.run(saved.world_size, trained, args, 2, 1)[0]
    args = loaded.args(tmp_path, bf16=not saved_bf16)
    at_load, _, end_again, result = workers.run(loaded.world_size, resumed, args, tmp_path, 2, 1)[0]
    assert "optimizer" in result.loaded
    assert same_bits(rounded(at_load), rounded(at_save)) and same_bits(rounded(end_again), rounded(end))
    in_fp32 = at_load if saved_bf16 else at_save
    assert not same_bits({name: tensor.float() for name, tensor in rounded(in_fp32).items()}, in_fp32)


def rounded(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.bfloat16() for name, tensor in weights.items()}


@pytest.mark.parametrize(("saved_bf16", "loaded_bf16"), [(True, False), (False, True)])
def test_weights_of_another_dtype_are_converted(
    workers: WorkerPool, tmp_path: Path, saved_bf16: bool, loaded_bf16: bool
):
    at_save, *_ = workers.run(1, trained, make_args(tmp_path, bf16=saved_bf16), 1, 0)[0]
    args = make_args(tmp_path, bf16=loaded_bf16, no_load_optim=True)
    at_load, *_ = workers.run(1, resumed, args, tmp_path, 1, 0)[0]
    assert {tensor.dtype for tensor in at_load.values()} == {torch.bfloat16 if loaded_bf16 else torch.float32}
    assert same_bits(at_load, {name: tensor.to(at_load[name].dtype) for name, tensor in at_save.items()})


def test_a_checkpoint_before_the_first_step(workers: WorkerPool, tmp_path: Path):
    before = workers.run(1, trained, make_args(tmp_path), 0, 1)
    after = workers.run(1, resumed, make_args(tmp_path), tmp_path, 0, 1)
    assert same_bits(after[0][2], before[0][2])
    assert "optimizer" not in after[0][3].loaded


def released(rank: int, world_size: int, init_method: str, args: Args, path: Path) -> Any:
    from slime.megatron.checkpoint.save_load import save_release

    with joined(args, rank, world_size, init_method) as topology:
        run = Run(args, topology)
        run.initialize()
        return save_release(path, model=run.model), run.weights()


def test_release_has_weights_only_and_starts_at_zero(workers: WorkerPool, tmp_path: Path):
    args = make_args(None, bf16=True)
    ((path, weights),) = workers.run(1, released, args, tmp_path)
    assert path == tmp_path / "release" and (tmp_path / TRACKER).read_text() == "release"
    at_load, _, end, result = workers.run(1, resumed, args, tmp_path, 0, 1)[0]
    assert same_bits(at_load, weights) and not same_bits(end, weights)
    # The fp32 copies were made from the loaded weights: one step from them is small.
    assert max((end[name].float() - weights[name].float()).abs().max().item() for name in end) < 0.05
    assert (result.rollout_id, result.state, result.path, result.loaded) == (None, None, path, ("model",))


def outcome(rank: int, world_size: int, init_method: str, args: Args, path: Path | None, state: Any = None) -> str:
    """Return the error of loading from `path`, or of saving `state`."""
    with joined(args, rank, world_size, init_method) as topology:
        run = Run(args, topology)
        try:
            run.save(0, state) if path is None else run.load(path)
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_a_failed_save_fails_on_every_rank(workers: WorkerPool, tmp_path: Path):
    (tmp_path / "file").write_text("")
    errors = workers.run(2, outcome, make_args(tmp_path / "file" / "save", tp=2), None, {})
    assert len(set(errors)) == 1 and errors[0].startswith("RuntimeError: checkpoint: NotADirectoryError")
    errors = workers.run(2, outcome, make_args(tmp_path / "save", tp=2), None, {"cursor": object()})
    without_room_left = {re.sub(r"\d+ MiB", "N MiB", error) for error in errors}  # each rank asks for itself
    assert len(without_room_left) == 1 and "checkpoint: TypeError: Object of type object" in errors[0]
    assert find_checkpoint(tmp_path / "save") is None


def without_room(rank: int, world_size: int, init_method: str, args: Args) -> tuple[list[str], list[str]]:
    """Save once; then, for each file of that save, save on a disk that is full when this file is written."""
    with joined(args, rank, world_size, init_method) as topology:
        run = Run(args, topology)
        run.initialize()
        run.step(0)
        run.save(0)
        files = sorted((file.stat().st_size, file.name) for file in (Path(args.save or "") / "iter_0000000").iterdir())
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        errors: list[str] = []
        for size, _ in files:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))
            try:
                run.save(1)
                errors.append("")
            except RuntimeError as error:
                errors.append(str(error))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return [name for _, name in files], errors


def test_a_full_disk_leaves_only_the_earlier_checkpoints(workers: WorkerPool, tmp_path: Path):
    [(files, errors)] = workers.run(1, without_room, make_args(tmp_path))
    assert {"common.pt", ".metadata", "metadata.json", STATE_FILE} < set(files)
    for file, error in zip(files, errors, strict=True):
        assert f"saving to {tmp_path} failed" in error
        assert "MiB are free there" in error, file
    assert {path.name for path in tmp_path.iterdir()} == {"iter_0000000", TRACKER}
    found = find_checkpoint(tmp_path)
    assert found is not None and found.rollout_id == 0


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 64},
        {"num_layers": 3},
        # fewer weights than the checkpoint has
        {"num_layers": 1},
        {"tied_embeddings": True},
        {"post_mlp_layernorm": False, "post_self_attn_layernorm": False},
        {"add_qkv_bias": False},
        # tables of the same padded length, tables of a longer one, matrices of the same size: Megatron would fill all
        {"vocab_size": 35},
        {"vocab_size": 60},
        {"num_attention_heads": 2, "num_query_groups": 1, "kv_channels": 16},
    ],
    ids=str,
)
def test_another_model_is_refused(workers: WorkerPool, tmp_path: Path, change: dict[str, Any]):
    workers.run(1, trained, make_args(tmp_path), 1, 0)
    args = replace(make_args(None, tp=2), architecture=replace(GLM4, **change))
    errors = workers.run(2, outcome, args, tmp_path)
    assert all(error.startswith(f"ValueError: {tmp_path}/iter_0000001 does not fit this model") for error in errors)


def without_sizes(rank: int, world_size: int, init_method: str, args: Args, path: Path) -> str:
    """Return the error of loading from `path` after slime's record of the model's sizes was removed."""
    common = torch.load(path / "iter_0000001" / "common.pt", weights_only=False)
    assert common.pop("model_sizes")["vocab_size"] == GLM4.vocab_size
    shutil.copytree(path / "iter_0000001", path / "release")
    (path / "release" / STATE_FILE).unlink()
    torch.save(common, path / "release" / "common.pt")
    return outcome(rank, world_size, init_method, args, path / "release")


def test_megatrons_own_checkpoint_of_fewer_tokens_is_refused(workers: WorkerPool, tmp_path: Path):
    """Such a checkpoint shows only the length of its table, 40 with padding."""
    workers.run(1, trained, make_args(tmp_path), 1, 0)
    args = replace(make_args(None), architecture=replace(GLM4, vocab_size=41))
    [error] = workers.run(1, without_sizes, args, tmp_path)
    assert "does not fit this model" in error and "an embedding of 40 rows there, 41 token ids here" in error
    shutil.rmtree(tmp_path / "release")
    assert workers.run(1, without_sizes, make_args(None), tmp_path) == [""]


@pytest.fixture(scope="module")
def saved_once(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    workers.run(2, trained, make_args(path, tp=2), 1, 0)
    return path


@pytest.fixture
def saves(saved_once: Path, tmp_path: Path) -> Path:
    """Return checkpoints of rollouts 1, 2 and 5."""
    for rollout_id in (1, 2, 5):
        shutil.copytree(saved_once / "iter_0000001", tmp_path / f"iter_{rollout_id:07d}")
    return tmp_path


def test_the_newest_or_the_requested_one_is_taken(saves: Path):
    newest = FoundCheckpoint(saves / "iter_0000005", "iteration", 5)
    assert find_checkpoint(saves) == newest
    assert find_checkpoint(saves, step=2) == FoundCheckpoint(saves / "iter_0000002", "iteration", 2)
    assert find_checkpoint(saves / "iter_0000005") == newest
    with pytest.raises(ValueError, match=r"--ckpt-step 3: .* \(there are: 1, 2, 5\)"):
        find_checkpoint(saves, step=3)
    with pytest.raises(ValueError, match="--ckpt-step 3"):
        find_checkpoint(saves / "missing", step=3)
    shutil.copytree(saves / "iter_0000005", saves / "release")
    assert find_checkpoint(saves) == newest
    assert find_checkpoint(saves / "release") == FoundCheckpoint(saves / "release", "release")


@pytest.mark.parametrize("missing", [".metadata", "metadata.json", "common.pt", STATE_FILE, "__1_0.distcp"])
def test_an_incomplete_checkpoint_is_skipped_and_named(saves: Path, missing: str, caplog: pytest.LogCaptureFixture):
    (saves / "iter_0000005" / missing).unlink()
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(saves) == FoundCheckpoint(saves / "iter_0000002", "iteration", 2)
    assert f"iter_0000005: no {missing}" in caplog.text
    with pytest.raises(ValueError, match="--ckpt-step 5"):
        find_checkpoint(saves, step=5)


@pytest.mark.parametrize("left", [-1, 0], ids=["cut short", "empty"])
@pytest.mark.parametrize("name", [".metadata", "metadata.json", "common.pt", STATE_FILE, "__0_0.distcp"])
def test_a_damaged_file_is_noticed(saves: Path, name: str, left: int):
    file = saves / "iter_0000005" / name
    file.write_bytes(file.read_bytes()[:left])
    found = find_checkpoint(saves)
    assert found is not None and found.rollout_id == 2
    file.with_name(STATE_FILE).write_text("{}")
    assert find_checkpoint(saves) == found


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "common.pt", STATE_FILE])
@pytest.mark.parametrize("place", [0.1, 0.5, 0.95])
def test_a_changed_byte_is_noticed(saves: Path, name: str, place: float):
    file = saves / "iter_0000005" / name
    flip(file, place)
    found = find_checkpoint(saves)
    assert found is not None and found.rollout_id == 2


def test_a_checkpoint_of_an_earlier_version_is_named(saves: Path, caplog: pytest.LogCaptureFixture):
    file = saves / "iter_0000005" / STATE_FILE
    state = json.loads(file.read_text())
    file.write_text(json.dumps({name: state[name] for name in state if name not in ("checksum", "file_digests")}))
    with caplog.at_level(logging.WARNING):
        found = find_checkpoint(saves)
    assert found is not None and found.rollout_id == 2
    assert f"{STATE_FILE} is damaged: it has no checksum; earlier versions of slime wrote none" in caplog.text


def flip(file: Path, place: float) -> None:
    """Flip one bit at the fraction `place` of the file."""
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("place", [0.0, 0.5, 1 - 1e-9])
def test_a_changed_byte_stops_loading_on_every_rank(workers: WorkerPool, saves: Path, place: float):
    flip(saves / "iter_0000005" / "__1_0.distcp", place)
    assert find_checkpoint(saves) == FoundCheckpoint(saves / "iter_0000005", "iteration", 5)
    expected = f"ValueError: {saves}/iter_0000005 is damaged: __1_0.distcp: not the bytes that were written; "
    errors = workers.run(2, outcome, make_args(None, tp=2), saves)
    assert all(error.startswith(expected) and "--ckpt-step" in error for error in errors)


@pytest.mark.parametrize("damaged", ["iter_0000005", "release"])
def test_only_damaged_checkpoints_are_not_an_empty_start(saves: Path, damaged: str):
    for name in ("iter_0000001", "iter_0000002"):
        shutil.rmtree(saves / name)
    (saves / "iter_0000005").rename(saves / damaged)
    (saves / damaged / ".metadata").write_bytes(b"")
    with pytest.raises(
        ValueError, match=rf"no complete checkpoint \({damaged}: \.metadata is damaged: 0 bytes of \d+\)"
    ):
        find_checkpoint(saves)


def test_release_is_not_used_next_to_damaged_checkpoints(saves: Path):
    shutil.copytree(saves / "iter_0000005", saves / "release")
    for name in ("iter_0000001", "iter_0000002", "iter_0000005"):
        (saves / name / "common.pt").unlink()
    with pytest.raises(
        ValueError, match=r"iter_0000001: no common\.pt; iter_0000002: .*; iter_0000005: no common\.pt\)"
    ):
        find_checkpoint(saves)


def test_megatrons_own_release_has_no_state_file(saves: Path):
    release = (saves / "iter_0000005").rename(saves / "release")
    (release / STATE_FILE).unlink()
    for path in saves.glob("iter_*"):
        shutil.rmtree(path)
    assert find_checkpoint(saves) == FoundCheckpoint(release, "release")
    (release / "__1_0.distcp").unlink()
    with pytest.raises(ValueError, match=r"release: no __1_0\.distcp"):
        find_checkpoint(saves)


def test_a_runs_own_files_are_an_empty_start(saves: Path):
    assert find_checkpoint(None) is None
    assert find_checkpoint(saves / "missing") is None
    for name in ("iter_0000001", "iter_0000002"):
        shutil.rmtree(saves / name)
    (saves / "iter_0000005").rename(saves / ".tmp_iter_0000005")
    (saves / "logs").mkdir()
    for name in ("args.yaml", "metrics.jsonl", TRACKER, "slime.log"):
        (saves / name).write_text("")
    assert find_checkpoint(saves) is None
    (saves / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds no checkpoint, but other files \(notes\.txt\)"):
        find_checkpoint(saves)


def test_files_that_flags_name_are_the_runs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = tmp_path / "run [1]"
    (root / "dumps" / "deep").mkdir(parents=True)
    (root / "hf_7").mkdir()
    (root / "samples of 3.json").write_text("")
    own = [f"{root}/dumps/deep/{{rollout_id}}.json", "run [1]/hf_{rollout_id:d}", None, str(tmp_path / "elsewhere")]
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint(root, own=own) is None
    for less in (own[1:], own[:1]):
        with pytest.raises(ValueError, match="other files"):
            find_checkpoint(root, own=less)
    (root / "hf").mkdir()
    with pytest.raises(ValueError, match=r"other files \(hf\)"):
        find_checkpoint(root, own=own)


def test_a_checkpoint_with_another_step_is_refused(saves: Path, tmp_path_factory: pytest.TempPathFactory):
    itself = saves / "iter_0000005"
    assert find_checkpoint(itself, step=5) == FoundCheckpoint(itself, "iteration", 5)
    hf = tmp_path_factory.mktemp("hf")
    for name in ("config.json", "model.safetensors"):
        (hf / name).write_text("")
    assert find_checkpoint(hf) == FoundCheckpoint(hf, "hf")
    for path in (itself, hf, (saves / "iter_0000002").rename(saves / "release")):
        with pytest.raises(ValueError, match=f"--ckpt-step 7: {path} is itself a checkpoint"):
            find_checkpoint(path, step=7)


def test_old_checkpoints_are_removed_and_release_stays(saves: Path):
    shutil.copytree(saves / "iter_0000005", saves / "release")
    assert remove_old(saves, 2, saved=5) == [saves / "iter_0000001"]
    assert sorted(path.name for path in saves.iterdir()) == ["iter_0000002", "iter_0000005", "release"]


def test_the_best_evaluated_checkpoint_stays(saves: Path):
    record = BestCheckpoint(saves, "eval/few/reward", say=print)
    record.saved(saves / "iter_0000001", step=2)
    record.evaluated({"eval/few/reward": 0.5}, step=2)
    assert remove_old(saves, 1, saved=5) == [saves / "iter_0000002"]
    assert remove_old(saves, 1, saved=5) == []
    record.saved(saves / "iter_0000005", step=6)
    record.evaluated({"eval/few/reward": 0.6}, step=6)
    assert remove_old(saves, 1, saved=5) == [saves / "iter_0000001"], "it was the best, and is not any more"
    assert find_checkpoint(saves) == FoundCheckpoint(saves / "iter_0000005", "iteration", 5)
    shutil.rmtree(saves / "iter_0000005")
    assert find_checkpoint(saves) is None, "the record is one of a run's own files"


def test_the_checkpoint_just_saved_is_never_removed(saves: Path):
    """A run that returned to rollout 1 saves 2, next to 5 of another branch."""
    assert remove_old(saves, 1, saved=2) == [saves / "iter_0000001"]
    assert sorted(path.name for path in saves.iterdir()) == ["iter_0000002", "iter_0000005"]


def test_damaged_checkpoints_do_not_count_as_kept(saves: Path):
    (saves / "iter_0000002" / "__0_0.distcp").unlink()
    assert remove_old(saves, 2, saved=5) == []
    assert remove_old(saves, 1, saved=5) == [saves / "iter_0000001"]
    (saves / "iter_0000005" / "common.pt").unlink()
    assert remove_old(saves, 1, saved=5) == []


def saved_thrice(rank: int, world_size: int, init_method: str, args: Args) -> None:
    with joined(args, rank, world_size, init_method) as topology:
        run = Run(args, topology)
        for rollout_id in (3, 4, 4):
            run.save(rollout_id)


def test_saving_replaces_the_rollout_and_removes_leftovers(workers: WorkerPool, saves: Path):
    (saves / ".tmp_iter_0000007").mkdir()
    shutil.rmtree(saves / "iter_0000005")
    workers.run(1, saved_thrice, make_args(saves, keep_last_checkpoints=2))
    assert sorted(path.name for path in saves.iterdir()) == ["iter_0000003", "iter_0000004", TRACKER]
    assert (saves / TRACKER).read_text() == "4"
