"""Nothing in a torch_dist directory is run: each place that may hold a pickle gets a harmful one here."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import Run, make_args, same_bits
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, MetadataIndex
from worker_pool import WorkerPool, joined

from slime.config.args import Args
from slime.megatron.checkpoint.files import find_checkpoint
from slime.megatron.checkpoint.manifest import STATE_FILE, digest, read_state, write_state, written_files
from slime.megatron.checkpoint.safe_pickle import METADATA, UnreadableFileError, UnsafeFileError, read_metadata

pytestmark = pytest.mark.dist


class Harm:
    """Calls `function(*args)` in whoever unpickles it."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def harms(marker: Path) -> dict[str, Harm]:
    """Return harmful objects, by the name that the error must contain."""
    return {
        "io.open": Harm(open, str(marker), "w"),
        "posix.system": Harm(os.system, f"touch {marker}"),
        "builtins.eval": Harm(eval, f"open({str(marker)!r}, 'w')"),
        "functools.partial": Harm(partial, open, str(marker)),
        "builtins.getattr": Harm(getattr, "touch", "format"),
        "shutil.rmtree": Harm(shutil.rmtree, str(marker.parent / "gone")),
        "torch.serialization.load": Harm(torch.load, str(marker)),
    }


@pytest.fixture(scope="module")
def saved(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    workers.run(1, save, make_args(path))
    return path / "iter_0000001"


def save(rank: int, world_size: int, init_method: str, args: Args) -> None:
    with joined(args, rank, world_size, init_method) as topology:
        run = Run(args, topology)
        run.initialize()
        run.step(0)
        run.save(1)


@pytest.fixture
def release(saved: Path, tmp_path: Path) -> Path:
    """Return the directory as Megatron's own converter leaves it: without digests of its files."""
    path = Path(shutil.copytree(saved, tmp_path / "load" / "release"))
    (path / STATE_FILE).unlink()
    return path


def test_harmful_metadata_is_refused_by_name(release: Path, tmp_path: Path):
    marker, original = tmp_path / "marker", (release / ".metadata").read_bytes()
    for name, harm in harms(marker).items():
        whole = pickle.loads(original)
        whole.planner_data = {"x": harm}
        for content in (harm, whole):
            (release / ".metadata").write_bytes(pickle.dumps(content))
            with pytest.raises(UnsafeFileError) as caught:
                find_checkpoint(release.parent)
            assert str(caught.value).startswith(f"{release}/.metadata: holds {name}"), caught.value
    assert not marker.exists()
    pickle.loads(pickle.dumps(harms(marker)["io.open"]))
    assert marker.exists(), "control: whoever unpickles it shows"


def test_a_listed_class_is_neither_called_nor_changed(release: Path):
    """A pickle may also set attributes of the classes that it names."""
    found = read_metadata(release)
    build = b"\x80\x04cpathlib\nPosixPath\nN}X\x07\x00\x00\x00__doc__X\x01\x00\x00\x00xs\x86b."
    (release / ".metadata").write_bytes(build)
    with pytest.raises(UnreadableFileError, match=r"release/\.metadata: cannot be read"):
        read_metadata(release)
    assert Path.__doc__ != "x" and type(found) is Metadata


def changed_metadata(release: Path, change: Callable[[Metadata], None]) -> None:
    whole = pickle.loads((release / ".metadata").read_bytes())
    change(whole)
    (release / ".metadata").write_bytes(pickle.dumps(whole))


def by_name(member: Enum, protocol: int) -> tuple[Any, ...]:
    return getattr, (type(member), member.name)


def test_metadata_of_pythons_that_pickle_enums_by_name(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's Python 3.11.2 writes the memory format of a tensor as getattr(class, name)."""
    file, before = release / METADATA, read_metadata(release)
    raw = pickle.loads(file.read_bytes())
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", by_name)
    file.write_bytes(pickle.dumps(raw))
    assert b"getattr" in file.read_bytes()
    assert read_metadata(release) == before
    file.write_bytes(pickle.dumps(Harm(getattr, Metadata, "__init__")))
    with pytest.raises(UnsafeFileError, match=r"builtins\.getattr"):
        read_metadata(release)


@pytest.mark.parametrize("path", ["../../x.distcp", "/etc/passwd", "..", "a/b.distcp", "..\\x.distcp", ""])
def test_metadata_outside_its_directory_is_refused(release: Path, path: str):
    def change(whole: Metadata) -> None:
        next(iter(whole.storage_data.values())).relative_path = path

    changed_metadata(release, change)
    with pytest.raises(UnsafeFileError, match=r"\.metadata: .* which is not a file of this directory"):
        find_checkpoint(release.parent)


@pytest.mark.parametrize(
    ("size", "message"),
    [((2**40, 2**40), "impossible shape"), ((2**45,), "should have"), ((-1, 4), "in place of a shape")],
)
def test_metadata_with_absurd_sizes_is_refused(release: Path, size: tuple[int, ...], message: str):
    """One tensor's shape claims terabytes, and its only part agrees."""

    def change(whole: Metadata) -> None:
        key = next(index for index in whole.storage_data if index.fqn == "decoder.final_layernorm.weight")
        described: Any = whole.state_dict_metadata[key.fqn]
        described.size = described.chunks[0].sizes = size
        described.chunks[0].offsets = (0,) * len(size)
        whole.storage_data[MetadataIndex(key.fqn, described.chunks[0].offsets)] = whole.storage_data.pop(key)

    changed_metadata(release, change)
    with pytest.raises(ValueError, match=message):
        find_checkpoint(release.parent)


def read_each(rank: int, world_size: int, init_method: str, release: Path, contents: list[bytes]) -> list[str]:
    """Return the error of each content of common.pt."""
    from slime.megatron.checkpoint.torch_dist import read_common

    errors: list[str] = []
    for content in contents:
        (release / "common.pt").write_bytes(content)
        try:
            read_common(release)
            errors.append("")
        except ValueError as error:
            errors.append(str(error))
    return errors


def test_harmful_common_part_is_refused_by_name(workers: WorkerPool, release: Path, tmp_path: Path):
    """Use the current format of torch.save, its older one, and a bare pickle."""
    marker, contents, names = tmp_path / "marker", list[bytes](), list[str]()
    for name, harm in harms(marker).items():
        for content in (harm, {"iteration": 1, "args": argparse.Namespace(x=harm)}):
            files = io.BytesIO(), io.BytesIO()
            torch.save(content, files[0])
            torch.save(content, files[1], _use_new_zipfile_serialization=False)
            contents += [files[0].getvalue(), files[1].getvalue()]
            names += [f"holds {name}", "cannot be read"]
        contents.append(pickle.dumps(harm))
        names.append(f"holds {name}")
    errors = workers.run(1, read_each, release, contents)[0]
    for error, name in zip(errors, names, strict=True):
        assert error.startswith(f"{release}/common.pt: {name}"), (error, name)
    assert not marker.exists()


def read_megatrons(rank: int, world_size: int, init_method: str, release: Path) -> None:

    from megatron.core.transformer.enums import AttnBackend

    from slime.megatron.checkpoint.torch_dist import read_common

    args = argparse.Namespace(
        lr=1e-3,
        params_dtype=torch.bfloat16,
        attention_backend=AttnBackend.auto,
        exit_signal=signal.SIGTERM,
        save=Path("/tmp/x"),
        betas=(0.9, 0.95),
    )
    torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 7, "scale": torch.ones(2)}, release / "common.pt")
    found = read_common(release)
    assert found["args"] == args and found["iteration"] == 7 and found["scale"].tolist() == [1, 1]


def test_megatrons_common_part_is_read(workers: WorkerPool, release: Path):
    workers.run(1, read_megatrons, release)


def with_payload(path: Path, key: str, content: Any) -> str:
    """Replace the object or tensor `key` by `content`, fix the digests, and return the name of its file."""
    whole = pickle.loads((path / ".metadata").read_bytes())
    index = next(index for index in whole.storage_data if index.fqn.startswith(key))
    place = whole.storage_data[index]
    payload = io.BytesIO()
    torch.save(content, payload)
    with (path / place.relative_path).open("ab") as file:
        place.offset, place.length = file.tell(), max(len(payload.getvalue()), place.length)
        file.write(payload.getvalue().ljust(place.length, b"\0"))
    (path / ".metadata").write_bytes(pickle.dumps(whole))
    if (path / STATE_FILE).exists():
        state, names = read_state(path), written_files(path)
        (path / STATE_FILE).unlink()
        write_state(path, {key: state[key] for key in ("rollout_id", "layout", "state")},
                    {name: digest(path / name) for name in names})  # fmt: skip
    return place.relative_path


def load_each(rank: int, world_size: int, init_method: str, args: Args, paths: list[Path]) -> list[Any]:
    """Return the weights from each path, or the error."""
    found: list[Any] = []
    with joined(args, rank, world_size, init_method) as topology:
        for path in paths:
            run = Run(args, topology)
            try:
                run.load(path)
                found.append(run.weights())
            except ValueError as error:
                found.append(str(error))
    return found


def test_harmful_parts_of_the_large_files(workers: WorkerPool, saved: Path, tmp_path: Path):
    marker = tmp_path / "marker"
    harm = Harm(open, str(marker), "w")
    copies = [Path(shutil.copytree(saved, tmp_path / name / saved.name)) for name in ("extra", "weight", "random")]
    extra, weight, rng = copies
    for path in (extra, weight):
        (path / STATE_FILE).unlink()
        path.rename(path.with_name("release"))
    extra, weight = extra.with_name("release"), weight.with_name("release")
    with_payload(extra, "decoder.layers.self_attention.linear_proj._extra_state", [harm])
    in_weight = with_payload(weight, "decoder.final_layernorm.weight", harm)
    in_rng = with_payload(rng, "rng_state", [harm])
    paths = [saved, extra, weight, rng]
    sound, without_extra, of_weight, of_rng = workers.run(1, load_each, make_args(None), paths)[0]
    assert same_bits(sound, without_extra), "_extra_state is not read"
    assert f"{weight / in_weight}: holds io.open, which neither" in of_weight
    assert f"{rng / in_rng}: holds io.open, which neither" in of_rng
    assert not marker.exists()
