"""Layers on pipeline stages: what can be built passes, and the rest says which number is wrong."""

from __future__ import annotations

import pytest
from config_run import Run

from slime.config.dry_run.memory import stage_layers

TWO = "--pipeline-model-parallel-size 2 --actor-num-gpus-per-node 2"
THREE = "--pipeline-model-parallel-size 3 --actor-num-gpus-per-node 3"
UNIFORM = "--recompute-granularity full --recompute-method uniform --recompute-num-layers"


@pytest.mark.parametrize(
    ("words", "layers"),
    [
        ("", [4]),
        (TWO, [2, 2]),
        (f"{TWO} --decoder-last-pipeline-num-layers 1", [3, 1]),
        (f"{THREE} --decoder-last-pipeline-num-layers 2", [1, 1, 2]),
        (f"{TWO} --decoder-last-pipeline-num-layers 1 {UNIFORM} 1", [3, 1]),
        (f"{TWO} {UNIFORM} 2", [2, 2]),
        (f"{TWO} --recompute-granularity full --recompute-method block --recompute-num-layers 3", [2, 2]),
    ],
)
def test_stages_that_can_be_built(run: Run, words: str, layers: list[int]) -> None:
    assert run.errors(*words.split()) == []
    args = run.args(*words.split())
    assert args.architecture is not None and stage_layers(args, args.architecture) == layers


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (THREE, "--pipeline-model-parallel-size 3: does not divide 4 layers"),
        (
            f"{THREE} --decoder-last-pipeline-num-layers 1",
            "--decoder-last-pipeline-num-layers 1: leaves 3 of 4 layers, which 2 other stages cannot share",
        ),
        (
            f"{THREE} --decoder-last-pipeline-num-layers 3",
            "--decoder-last-pipeline-num-layers 3: leaves 1 of 4 layers, which 2 other stages cannot share",
        ),
        (f"{TWO} --decoder-last-pipeline-num-layers 4", "leaves 0 of 4 layers"),
        (f"{TWO} --decoder-last-pipeline-num-layers 5", "leaves 0 of 4 layers"),
        (f"{UNIFORM} 3", "--recompute-num-layers 3: --recompute-method uniform: does not divide a stage's"),
        (f"{TWO} {UNIFORM} 4", "--recompute-num-layers 4: --recompute-method uniform: does not divide a stage's"),
        (
            f"{TWO} --decoder-last-pipeline-num-layers 1 {UNIFORM} 3",
            "--recompute-num-layers 3: --recompute-method uniform: does not divide a stage's",
        ),
        ("--recompute-granularity selective --recompute-num-layers 1", "--recompute-num-layers 1: selective"),
    ],
)
def test_stages_that_cannot(run: Run, words: str, message: str) -> None:
    assert message in run.error(*words.split(), "--dry-run")


def test_the_last_of_one_stage_says_nothing(run: Run) -> None:
    [warning] = run.warnings("--decoder-last-pipeline-num-layers", "1")
    assert "--decoder-last-pipeline-num-layers 1: no effect: --pipeline-model-parallel-size is 1" in warning


@pytest.mark.parametrize("words", ["--overlap-p2p-comm", "--num-microbatches-with-partial-activation-checkpoints 1"])
def test_fields_that_the_schedule_refuses(run: Run, words: str) -> None:
    assert "not part of this version" in run.error(*words.split(), *TWO.split())


def test_modules_that_cannot_be_recomputed(run: Run) -> None:
    selective = ["--recompute-granularity", "selective", "--recompute-modules"]
    assert "--recompute-modules: layernorm: only core_attn and mlp" in run.error(*selective, "mlp", "layernorm")
    assert run.errors(*selective, "mlp", "core_attn") == []
