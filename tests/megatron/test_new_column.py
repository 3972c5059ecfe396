"""A new per-token field takes two edits, and reaches a custom loss: counted on a copy of the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slime.core.columns import COLUMNS
from slime.core.sample import Sample

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

EDITS = [
    ("core/sample.py", "    routed_experts: NDArray", "    surprises: list[float] | None = None\n"),
    (
        "core/columns.py",
        '    "offpolicy": Column(',
        '    "surprises": Column(axis=Axis.RESPONSE, dtype="float32", sample_field="surprises", meaning="dummy"),\n',
    ),
]
"""The edits of a contributor: a file of the package, the line before which the text goes, and the text."""

HAS_ROW = "from slime.core.columns import PER_TOKEN; assert PER_TOKEN[-1] == 'surprises', 'the field has no row'"
"""Runs before torch is imported, which takes seconds."""

PROMPT, LENGTHS = 3, (4, 2, 5, 3)


def surprises_of(index: int) -> list[float]:
    return [index + token / 16 for token in range(LENGTHS[index])]


def reads_the_field(inputs, options):  # pyright: ignore
    """A custom loss that weights each token by the new field, which is no field of LossInputs."""
    loss_R = -inputs.log_probs_R * inputs.columns["surprises"]
    return loss_R, {"surprise": inputs.columns["surprises"]}


def follow(directory: str) -> None:
    """Take the field from samples, their copies and JSON to training, in a process with the edited package."""
    import tiny

    from slime.core.batch import from_samples
    from slime.megatron.trainer import Trainer

    samples = [
        Sample(
            group_index=0,
            index=index,
            tokens=[7, 8, 9, *range(10, 10 + length)],
            prompt_length=PROMPT,
            response_length=length,
            reward=float(index % 2),
            surprises=surprises_of(index),  # pyright: ignore[reportCallIssue]
        )
        for index, length in enumerate(LENGTHS)
    ]
    samples = [Sample.from_dict(sample.copy().to_dict()) for sample in samples]
    broken = samples[1].copy()
    broken.surprises = [1.0]  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="surprises has 1 entries for 2 response tokens"):
        broken.check()
    batch = from_samples(samples)
    args = tiny.make_args(
        tiny.hf_dir(Path(directory) / "model", "qwen3"),
        max_tokens_per_gpu=16,  # several micro-batches
        loss_type="custom_loss",
        custom_loss_function_path="test_new_column.reads_the_field",
        calculate_per_token_loss=True,
    )
    trainer = Trainer(args, rank=0, world_size=1, init_method=f"file://{directory}/store")
    trainer.load()
    metrics = trainer.train(0, batch)
    trainer.close()
    every = [value for index in range(len(LENGTHS)) for value in surprises_of(index)]
    assert metrics["train/num_micro_batches"] > 1
    assert metrics["train/surprise"] == pytest.approx(sum(every) / len(every), rel=1e-6)


def _run_with(edits: list[tuple[str, str, str]], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    package = shutil.copytree(ROOT / "slime", tmp_path / "slime")  # with what is compiled of files without an edit
    for name, before, text in edits:
        source = (package / name).read_text(encoding="utf-8")
        assert source.count(before) == 1
        (package / name).write_text(source.replace(before, text + before), encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(HERE), str(HERE.parent)])
    return subprocess.run(
        [sys.executable, "-c", f"{HAS_ROW}; import test_new_column; test_new_column.follow({str(tmp_path)!r})"],
        cwd=tmp_path,  # python -c looks here first
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_per_token_field_is_two_edits(tmp_path: Path) -> None:
    assert len(EDITS) == 2
    found = _run_with(EDITS, tmp_path)
    assert found.returncode == 0, found.stderr[-3000:]


def test_a_field_without_its_row_is_noticed(tmp_path: Path) -> None:
    found = _run_with(EDITS[:1], tmp_path)
    assert found.returncode != 0 and "AssertionError: the field has no row" in found.stderr


def test_every_loss_input_has_a_field() -> None:
    from dataclasses import fields

    from slime.algo.losses import LossInputs

    own = {"log_probs_R", "entropy_R"}  # this step's forward pass
    named = {field.name for field in fields(LossInputs) if field.name.endswith("_R")} - own
    assert named == {f"{name}_R" for name, column in COLUMNS.items() if column.loss_input}
    everything = {name: torch.zeros(1) for name in named | own}
    assert LossInputs(**everything).columns == {}  # pyright: ignore[reportArgumentType]
