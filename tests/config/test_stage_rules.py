"""Layers on pipeline stages: possible layouts pass, and errors name the wrong number."""

from __future__ import annotations

import pytest
from config_run import Run

from slime.config.pipeline_stages import count_multiple, num_chunks, stage_layers
from slime.plan.summary import format_plan

TWO = "--pipeline-model-parallel-size 2 --actor-num-gpus-per-node 2"
THREE = "--pipeline-model-parallel-size 3 --actor-num-gpus-per-node 3"
VIRTUAL, NUM_VIRTUAL = "--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank"
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
        (f"{TWO} {VIRTUAL} 1", [2, 2]),
        (f"{TWO} {VIRTUAL} 2", [2, 2]),
        (f"{TWO} {NUM_VIRTUAL} 2 {UNIFORM} 1 --microbatch-group-size-per-vp-stage 3", [2, 2]),
        (f"{TWO} {NUM_VIRTUAL} 1 --decoder-last-pipeline-num-layers 1", [3, 1]),
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
        (f"{UNIFORM} 3", "--recompute-num-layers 3: does not divide a stage's"),
        (f"{TWO} {UNIFORM} 4", "--recompute-num-layers 4: does not divide a stage's"),
        (
            f"{TWO} --decoder-last-pipeline-num-layers 1 {UNIFORM} 3",
            "--recompute-num-layers 3: does not divide a stage's",
        ),
        ("--recompute-granularity selective --recompute-num-layers 1", "--recompute-num-layers 1: selective"),
        (f"{TWO} {VIRTUAL} 3", f"{VIRTUAL} 3: does not divide a stage's number of layers, 2"),
        (f"{TWO} {NUM_VIRTUAL} 4", f"{NUM_VIRTUAL} 4: does not divide a stage's number of layers, 2"),
        (
            f"{TWO} {NUM_VIRTUAL} 3 --decoder-last-pipeline-num-layers 1",
            f"{NUM_VIRTUAL} 3: does not divide a stage's number of layers, 1",
        ),
        (f"{TWO} {VIRTUAL} 1 --decoder-last-pipeline-num-layers 1", "give the number of virtual stages with --num-"),
        (f"{TWO} {VIRTUAL} 1 {NUM_VIRTUAL} 2", f"{VIRTUAL} 1: {NUM_VIRTUAL} 2 also sets it"),
        (f"{TWO} {VIRTUAL} 1 {UNIFORM} 2", "does not divide a virtual stage's number of layers, 1"),
        (
            f"{TWO} {VIRTUAL} 1 --microbatch-group-size-per-vp-stage 1",
            "1 is less than the number of pipeline stages, 2",
        ),
        (f"{TWO} {VIRTUAL} 1 --no-overlap-p2p-comm", "--no-overlap-p2p-comm: with virtual stages on two ranks"),
        (f"{TWO} {VIRTUAL} 1 --batch-p2p-comm", "--batch-p2p-comm: virtual stages send one by one"),
        (f"{TWO} --overlap-p2p-comm", "--overlap-p2p-comm: it needs virtual pipeline stages"),
    ],
)
def test_stages_that_cannot(run: Run, words: str, message: str) -> None:
    assert message in run.error(*words.split(), "--dry-run")


@pytest.mark.parametrize("flag", ["--decoder-last-pipeline-num-layers", VIRTUAL, NUM_VIRTUAL])
def test_flags_without_effect_on_one_stage(run: Run, flag: str) -> None:
    [warning] = run.warnings(flag, "1")
    assert f"{flag} 1: no effect: --pipeline-model-parallel-size is 1" in warning


def test_a_field_that_the_schedule_refuses(run: Run) -> None:
    words = "--num-microbatches-with-partial-activation-checkpoints 1"
    assert "not part of this version" in run.error(*words.split(), *TWO.split())


@pytest.mark.parametrize(
    ("words", "chunks", "multiple"),
    [
        ("", 1, 1),
        (f"{VIRTUAL} 1", 1, 1),
        (TWO, 1, 1),
        (f"{TWO} {VIRTUAL} 2", 1, 1),
        (f"{TWO} {VIRTUAL} 1", 2, 2),
        (f"{TWO} {NUM_VIRTUAL} 2 --microbatch-group-size-per-vp-stage 3", 2, 3),
    ],
)
def test_virtual_stages_of_a_rank(run: Run, words: str, chunks: int, multiple: int) -> None:
    args = run.args(*words.split())
    assert (num_chunks(args), count_multiple(args)) == (chunks, multiple)
    plan = format_plan(args, [])
    assert ("2, 2 layers, each in 2 virtual stages" in plan) == ("empty ones fill a step up" in plan) == (chunks > 1)


def test_modules_that_cannot_be_recomputed(run: Run) -> None:
    selective = ["--recompute-granularity", "selective", "--recompute-modules"]
    assert "--recompute-modules: layernorm: only core_attn and mlp" in run.error(*selective, "mlp", "layernorm")
    assert run.errors(*selective, "mlp", "core_attn") == []
