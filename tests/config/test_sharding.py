"""The default of --use-distributed-optimizer: on for GPUs if it shards anything, never on for a CPU."""

from __future__ import annotations

import json

import pytest
from config_run import Run
from test_expert_rules import QWEN
from test_page import DECOUPLED, page_words

from slime.cluster.on_ray.placement import choose_engine
from slime.config.args import Args
from slime.config.parse import load_args
from slime.config.resolve import cuda_available
from slime.config.sharding import optimizer_ranks, resolve_sharding
from slime.plan.summary import format_plan

ON_GPUS = ("--dry-run", "--bf16", "--rollout-engine", "sglang")
FOUR = ("--actor-num-gpus-per-node", "4")


@pytest.mark.parametrize(
    ("flags", "ranks", "shared"),
    [
        ("", 4, True),
        ("--tensor-model-parallel-size 2", 2, True),
        ("--tensor-model-parallel-size 2 --context-parallel-size 2", 2, True),
        ("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2", 1, False),
        ("--optimizer sgd", 4, False),
        ("--no-use-distributed-optimizer", 4, False),
        ("--use-distributed-optimizer", 4, True),
    ],
)
def test_when_it_is_on(run: Run, flags: str, ranks: int, shared: bool) -> None:
    args, problems = run.load(*ON_GPUS, *FOUR, *flags.split())
    assert (optimizer_ranks(args), args.use_distributed_optimizer) == (ranks, shared)
    assert ("a share of 1/" in format_plan(args, problems)) == shared
    assert ("not sharded over the 4 ranks: Megatron can only shard adam" in format_plan(args, problems)) == (
        "sgd" in flags
    )


@pytest.mark.skipif(cuda_available(), reason="is about a machine without CUDA")
def test_a_cpu_run_keeps_it_off(run: Run) -> None:
    assert run.args(*FOUR).use_distributed_optimizer is False
    assert run.args(*FOUR, "--use-distributed-optimizer").use_distributed_optimizer is True


def test_experts_have_ranks_of_their_own(run: Run) -> None:
    """With TP 2 and ETP 1 on two GPUs, there is one data-parallel rank, but two ranks have the same experts."""
    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    (run.hf / "config.json").write_text(json.dumps(QWEN | small))
    words = (*ON_GPUS, "--actor-num-gpus-per-node", "2", "--tensor-model-parallel-size", "2", "--sequence-parallel")
    alone, own = run.args(*words), run.args(*words, "--expert-tensor-parallel-size", "1")
    assert (optimizer_ranks(alone), alone.use_distributed_optimizer) == (1, False)
    assert (own.data_parallel_size, optimizer_ranks(own), own.use_distributed_optimizer) == (1, 2, True)


@pytest.mark.skipif(cuda_available(), reason="is about a machine without CUDA")
def test_a_cluster_of_others_decides(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has no GPU, and the GPUs of Ray's cluster are known only after the run joins it."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    args, problems = run.load(*FOUR, "--rollout-engine", "auto", "--bf16")
    assert args.use_distributed_optimizer is None
    assert "sharded (--use-distributed-optimizer) if Ray's cluster has GPUs" in format_plan(args, problems)
    assert choose_engine(args, 8).use_distributed_optimizer is True
    assert choose_engine(args, 0).use_distributed_optimizer is False


def test_it_is_decided_once() -> None:
    args, _ = load_args([*page_words(DECOUPLED), *ON_GPUS])
    assert resolve_sharding(args) is args
    assert Args().use_distributed_optimizer is None


def test_given_when_there_is_nothing_to_shard(run: Run) -> None:
    warning = "--use-distributed-optimizer: no effect: no two ranks hold the same weights"
    assert any(text.startswith(warning) for text in run.warnings("--use-distributed-optimizer"))
    assert not any(text.startswith(warning) for text in run.warnings("--use-distributed-optimizer", *FOUR))
