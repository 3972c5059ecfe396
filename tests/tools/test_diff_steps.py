"""tools/diff_steps.py on made-up dumps: what it names, and what it does not compare.

Dumps of a real Trainer are tested in tests/megatron/test_dump_steps.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slime.observability.step_files import INDEX, Axis, Entry, StepFiles, StepFilesWriter
from tools import diff_steps
from tools.diff_steps import compare, main

Tensors = dict[str, dict[str, Tensor]]
AXES = {
    **dict.fromkeys(("total_lengths", "response_lengths", "sample_indices", "group_indices", "rewards"), Axis.SAMPLE),
    **dict.fromkeys(("tokens", "routed_experts"), Axis.TOKEN),
    **dict.fromkeys(("loss_mask", "old_log_probs", "log_probs"), Axis.RESPONSE),
}


def dump() -> Tensors:
    """Return two samples of 4 and 5 tokens, 2 and 3 of them response; each step takes one, the second sample first."""
    places: Tensors = {
        "rollout 7": {
            "total_lengths": torch.tensor([4, 5]),
            "response_lengths": torch.tensor([2, 3]),
            "tokens": torch.tensor([10, 11, 12, 13, 20, 21, 22, 23, 24]),
            "loss_mask": torch.ones(5),
            "rewards": torch.tensor([0.0, math.nan]),
            "group_indices": torch.tensor([14, 14]),
            "sample_indices": torch.tensor([28, 29]),
            "routed_experts": torch.zeros(9, 2, 3, dtype=torch.int32),
            "old_log_probs": torch.linspace(-2, -1, 5),
        }
    }
    for number, response_tokens in enumerate(([2, 3, 4], [0, 1])):
        places[f"rollout 7, step {number}"] = {
            "places": torch.tensor(response_tokens),
            "log_probs": torch.linspace(-2, -1, len(response_tokens)),
            "token_loss": torch.linspace(-1, 1, len(response_tokens)),
            "loss": torch.tensor(1e-9, dtype=torch.float64),
            "gradient a.weight": torch.arange(12.0).reshape(3, 4),
            "gradient_norm": torch.tensor(2.0, dtype=torch.float64),
            "weight a.weight": torch.arange(12.0).reshape(3, 4).bfloat16(),
        }
    return places


def write(path: Path, places: Tensors, **options: Any) -> Path:
    writer = StepFilesWriter(path, {"ranks": 1}, **options)
    for place, tensors in places.items():
        written = writer.begin(place, int(place.split()[1].strip(",")))
        for name, tensor in tensors.items():
            axis = Axis.STEP if ", step" in place and tensor.ndim == 1 else AXES.get(name, Axis.ENTRY)
            written.add(name, tensor, axis)
        written.end()
    return path


@pytest.fixture
def diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Compare `dump()` as A with another dump as B."""

    def run(places: Tensors, *flags: str) -> tuple[int, str]:
        a, b = (
            write(tmp_path / f"{name}{len(list(tmp_path.iterdir()))}", each)
            for name, each in (("a", dump()), ("b", places))
        )
        capsys.readouterr()
        code = main([str(a), str(b), *flags])
        return code, "".join(capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("place", "name", "index", "message"),
    [
        ("rollout 7", "rewards", (0,), "sample 28 of group 14: 0 in A, 1 in B"),
        ("rollout 7", "loss_mask", (2,), "sample 29 of group 14, response token 0 of 3 (id 22): 1 in A, 2 in B"),
        ("rollout 7", "loss_mask", (1,), "sample 28 of group 14, response token 1 of 2 (id 13): 1 in A, 2 in B"),
        ("rollout 7", "routed_experts", (5, 1, 0), "sample 29 of group 14, token 1 of 5 (id 21): 0 in A, 1 in B"),
        ("rollout 7, step 0", "log_probs", (2,), "sample 29 of group 14, response token 2 of 3 (id 24): -1 in A, 0"),
        ("rollout 7, step 1", "log_probs", (0,), "sample 28 of group 14, response token 0 of 2 (id 12): -2 in A, -1"),
        ("rollout 7, step 0", "loss", (), "the number: 1e-09 in A, 1 in B"),
        ("rollout 7, step 1", "gradient a.weight", (2, 1), "entry [2, 1]: 9 in A, 10 in B"),
        ("rollout 7, step 1", "weight a.weight", (0, 3), "entry [0, 3]: 3 in A, 4 in B"),
    ],
)
def test_the_first_difference_is_named(place: str, name: str, index: Any, message: str, diff: Any) -> None:
    other = dump()
    other[place][name][index] += 1
    other["rollout 7, step 1"]["weight a.weight"][2, 3] = -1  # a later one
    code, text = diff(other)
    assert code == 1
    assert f": {place}: {name}\n  {message}" in text, text


def test_equal_runs_are_reported_and_shown(diff: Any) -> None:
    code, text = diff(dump())
    assert code == 0 and "23 tensors: equal bit for bit" in text and "gradient" not in text
    code, text = diff(dump(), "--all")
    assert code == 0 and text.count("gradient a.weight  [3, 4]") == 2, text


def test_bits_and_tolerances(diff: Any) -> None:
    other = dump()
    for step in ("rollout 7, step 0", "rollout 7, step 1"):
        other[step]["gradient a.weight"][0, 1] += 1e-4
        other[step]["loss"] += 2e-6
    assert diff(other)[0] == 1
    assert diff(other, "--rtol", "1e-5")[0] == 0, "relative to the largest gradient, and to the largest token's loss"
    code, text = diff(other, "--rtol", "1e-6")
    assert code == 1 and "step 0: loss\n" in text
    assert diff(other, "--atol", "2e-4")[0] == 0
    other["rollout 7"]["routed_experts"][0, 0, 0] = 1
    code, text = diff(other, "--rtol", "1", "--atol", "1")
    assert code == 1 and "7: routed_experts" in text, "integers are exact"


def test_numbers_that_are_not_finite() -> None:
    def found(a: list[float], b: list[float], **tolerance: float) -> int:
        entry = Entry("x", Axis.ENTRY, "")
        return compare("p", entry, torch.tensor(a), torch.tensor(b), **tolerance).num_differing

    inf, nan = math.inf, math.nan
    for tolerance in ({}, {"rtol": 0.1}):
        assert found([nan, inf, -inf, 1], [nan, inf, -inf, 1], **tolerance) == 0
        assert found([nan, inf, inf, 1, 1], [1, -inf, 1, nan, 1], **tolerance) == 4
    assert found([0.0], [-0.0]) == 1
    assert found([0.0], [-0.0], atol=1e-9) == 0


def test_large_tensors_are_compared_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.arange(100.0).reshape(10, 10)
    b = a.clone()
    b[4, 7], b[9, 9] = 0, 0
    whole = compare("p", Entry("x", Axis.ENTRY, ""), a, b)
    monkeypatch.setattr(diff_steps, "CHUNK", 7)
    parts = compare("p", Entry("x", Axis.ENTRY, ""), a, b)
    assert (parts.first, parts.num_differing, parts.largest) == (47, 2, 99) == (whole.first, whole.num_differing, 99)
    assert parts.relative == pytest.approx(math.hypot(47, 99) / float(a.double().norm()))


def _swapped() -> Tensors:
    other = dump()
    for name, values in other["rollout 7"].items():
        if AXES[name] is Axis.SAMPLE:
            other["rollout 7"][name] = values.flip(0)
    return other


def _with(place: str, name: str, values: Any) -> Tensors:
    other = dump()
    other[place][name] = torch.as_tensor(values)
    return other


def _without(*names: str) -> Tensors:
    other = dump()
    for place in other.values():
        for name in names:
            place.pop(name, None)
    return other


def _fewer(*places: str) -> Tensors:
    return {name: tensors for name, tensors in dump().items() if name in places}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (_swapped, "rollout 7: the same samples in another order: row 0 is sample 28 of group 14 in A, sample 29 of"),
        (lambda: _with("rollout 7", "sample_indices", [28, 31]), "other samples: row 1 is sample 29 of group 14 in A"),
        (
            lambda: _with("rollout 7", "tokens", [10, 11, 12, 13, 20, 21, 9, 23, 24]),
            "rollout 7: sample 29 of group 14 has other tokens in B, from token 2 on",
        ),
        (
            lambda: _with("rollout 7", "response_lengths", [2, 4]),
            "sample 29 of group 14 has 5 tokens in A, 3 of them response, and 5, 4 in B",
        ),
        (lambda: _with("rollout 7, step 0", "places", [1, 3, 4]), "rollout 7, step 0: the step has other tokens"),
        (
            lambda: _with("rollout 7, step 0", "gradient a.weight", torch.zeros(3, 5)),
            "rollout 7, step 0: gradient a.weight is [3, 4] in A and [3, 5] in B",
        ),
        (lambda: _without("old_log_probs"), "rollout 7: only A has old_log_probs"),
        (lambda: _without("tokens"), "rollout 7: tokens are missing"),
        (
            lambda: _fewer("rollout 7", "rollout 7, step 0"),
            "rollout 7: A's steps are rollout 7, step 0, rollout 7, step 1; B's are rollout 7, step 0",
        ),
        (lambda: {"rollout 8": dump()["rollout 7"]}, "A continues with rollout 7, B with rollout 8"),
        (lambda: dump() | {"rollout 8": dump()["rollout 7"]}, "the rest: A ends before rollout 8"),
        (lambda: {"rollout 7": {**dump()["rollout 7"], "zz": torch.ones(1)}, **_fewer(*list(dump())[1:])}, "only B"),
    ],
)
def test_runs_that_cannot_be_compared(other: Callable[[], Tensors], message: str, diff: Any) -> None:
    code, text = diff(other())
    assert code == 2, text
    assert message in text and "cannot compare" in text, text


def test_an_earlier_difference_is_still_named(diff: Any) -> None:
    other = dump() | {"rollout 8": dump()["rollout 7"]}
    other["rollout 7"]["rewards"][0] = 1
    code, text = diff(other)
    assert code == 1 and "rollout 7: rewards" in text and "cannot compare the rest: A ends" in text, text


def test_files_that_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dumps = [write(tmp_path / name, dump(), max_file_bytes=100) for name in "ab"]
    assert len(list(dumps[0].glob("rollout-7-step-0-*.safetensors"))) == 2, "in several files"
    a, b = map(str, dumps)
    assert main([a, b]) == 0
    gone = dumps[1] / "rollout-7-step-1-1.safetensors"
    content = gone.read_bytes()
    gone.write_bytes(content[:-8])
    assert main([a, b]) == 2
    gone.unlink()
    assert main([a, b]) == 2
    index = dumps[1] / INDEX
    index.write_text(index.read_text().replace('"format": 1', '"format": 99'))
    assert main([a, b]) == 2
    index.write_text(json.dumps({"format": 1}))
    assert main([a, b]) == 2
    place = {"name": "x", "rollout_id": 0, "tensors": [{"name": "a", "axis": "entry", "file": "../a/x.safetensors"}]}
    index.write_text(json.dumps({"format": 1, "facts": {}, "places": [place]}))
    assert main([a, b]) == 2
    for content in (b"\x80\x04N.", b"[" * 100_000, b"[]"):
        index.write_bytes(content)
        assert main([a, b]) == 2
    index.unlink()
    assert main([a, b]) == 2
    message = capsys.readouterr().err.splitlines()
    expected = (
        "is damaged",
        "1-1.safetensors is missing; index.json lists",
        "has format 99",
        "is not an index",
        "'../a/x.safetensors' is not a file in this directory",
        *["is not an index"] * 3,
        "no index",
    )
    assert len(message) == len(expected)
    for line, words in zip(message, expected, strict=True):
        assert words in line and line.startswith("cannot compare"), line


def test_tensors_in_reverse_order(tmp_path: Path) -> None:
    writer = StepFilesWriter(tmp_path / "dump", {})
    for place, count in (("rollout 0", 2), ("rollout 0, step 0", 3), ("rollout 0, step 1", 0)):
        written = writer.begin(place, 0)
        for name in "abc":
            written.add(name, torch.ones(1), Axis.ENTRY)
        written.turn(count)
        written.end()
    orders = ["".join(entry.name for entry in place.tensors) for place in StepFiles(tmp_path / "dump").places]
    assert orders == ["acb", "cba", "abc"]


def test_a_directory_can_be_continued(tmp_path: Path) -> None:
    write(tmp_path / "dump", dump())
    writer = StepFilesWriter(tmp_path / "dump", {})
    writer.forget_from(8)
    assert len(StepFiles(tmp_path / "dump").places) == 3
    writer.forget_from(7)
    assert [path.name for path in (tmp_path / "dump").iterdir()] == [INDEX]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--save-debug-train-data .*file/dump: cannot be written"):
        StepFilesWriter(tmp_path / "file" / "dump", {})
    StepFilesWriter(tmp_path / "new", {})
    assert list((tmp_path / "new").iterdir()) == [], "a run that fails before its first rollout leaves nothing"
