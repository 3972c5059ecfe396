"""The memory of mixtures of experts in a plan, computed by hand for published models; measured in test_memory.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from test_architecture import planned
from test_plan import memory_of

from slime.config.args import Args
from slime.config.pipeline_stages import stage_layer_numbers
from slime.config.sharding import dense_ranks, expert_ranks
from slime.core.architecture import Architecture
from slime.plan.fit import fullest, memory_problems, moments
from slime.plan.memory_model import EngineMemory, Parameters, engine_memory, rank_sizes, stage_memory, stage_parameters
from slime.plan.moe_activations import moe_operations
from slime.plan.summary import format_plan

GIB = 2**30
LAYOUT: dict[str, Any] = {
    "bf16": True,
    "sequence_parallel": True,
    "tensor_model_parallel_size": 4,
    "expert_tensor_parallel_size": 1,
    "use_distributed_optimizer": True,
    "use_dynamic_batch_size": True,
    "max_tokens_per_gpu": 8192,
    "rollout_max_response_len": 8192,
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
    "rollout_engine": "sglang",
    "rollout_num_gpus": 8,
    "rollout_num_gpus_per_engine": 4,
}


@pytest.fixture(scope="module")
def qwen() -> Args:
    """Qwen3-30B-A3B on one node of 8 GPUs."""
    return replace(
        planned("qwen3-30B-A3B"), **LAYOUT, actor_num_gpus_per_node=8, expert_model_parallel_size=8, gpu_memory=139.8
    )


@pytest.fixture(scope="module")
def air() -> Args:
    """GLM-4.5-Air on 4 nodes of 8 GPUs, in two pipeline stages."""
    return replace(
        planned("glm4.5-106B-A12B"),
        **LAYOUT,
        actor_num_nodes=4,
        actor_num_gpus_per_node=8,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=16,
    )


def architecture(args: Args) -> Architecture:
    return args.resolved.architecture


def engine_of(args: Args) -> EngineMemory:
    found = engine_memory(args)
    assert found is not None
    return found


def test_qwen3_30b_by_hand(qwen: Args) -> None:
    """A rank has 1/4 of attention, whole norms and routers, and 16 of 128 experts.

        attention  48 x 2048 x 128 x (32 + 2 x 4 + 32) / 4      =   226,492,416
        norms      48 x (2 x 2048 + 2 x 128) + 2048             =       210,944
        routers    48 x 128 x 2048                              =    12,582,912
        tables     2 x 152,064 / 4 x 2048                       =   155,713,536    the vocabulary is padded
        experts    48 x 16 x 3 x 2048 x 768                     = 3,623,878,656

    2 GPUs (8 / TP 4) share the optimizer of the first four, none that of the experts (8 / EP 8): 12 bytes a parameter.
    """
    arch = architecture(qwen)
    dense = 226_492_416 + 210_944 + 12_582_912 + 155_713_536
    experts = 3_623_878_656
    assert stage_parameters(qwen, arch, 0) == Parameters(dense=dense, experts=experts, biases=0)
    assert (dense_ranks(qwen), expert_ranks(qwen)) == (2, 1)
    memory = stage_memory(qwen, arch, 0, on_cuda=True)
    assert memory.weights == 2 * (dense + experts)
    assert memory.gradients == 4 * (dense + experts)
    assert memory.optimizer == 12 * (dense // 2 + experts)
    # whole layers are recomputed: 48 inputs of 2048 tokens, and of each layer's last routing 128 x 5 bytes for each
    # token and 8 for each of its 8 copies; the buffer for gathered tokens
    inputs = 48 * 2048 * 2048 * 2
    routing = 48 * 2048 * (128 * 5 + 8 * 8)
    others = memory.activations - inputs - routing - 8192 * 2048 * 2
    assert 0 < others < 0.05 * inputs  # rotary tables, the final norm, token ids
    # two of 8 GPUs hold 1/4 of the weights outside routers: 30.53 billion in bf16
    engine = engine_of(qwen)
    routers = 12_582_912
    assert engine.weights == 2 * ((arch.num_parameters() - routers) // 4 + routers)
    assert engine.weights / GIB == pytest.approx(14.2, abs=0.1)


def test_glm_4_5_air_by_hand(air: Args) -> None:
    """The first stage has the dense layer, 22 layers of experts and the embedding.

        attention     23 x (4096 x 128 x (96 + 2 x 8 + 96) + 128 x (96 + 2 x 8)) / 4 =   627,130,880    with biases
        norms         23 x 2 x 4096                                                  =       188,416
        dense layer   3 x 4096 x 10,944 / 4                                          =    33,619,968
        shared        22 x 3 x 4096 x 1408 / 4                                       =    95,158,272
        routers       22 x 128 x 4096                                                =    11,534,336
        embedding     151,552 / 4 x 4096                                             =   155,189,248
        experts       22 x 8 x 3 x 4096 x 1408                                       = 3,045,064,704    of EP 16

    The routers' 22 x 128 biases are fp32, and so are their counts of tokens.
    """
    arch = architecture(air)
    dense = 627_130_880 + 188_416 + 33_619_968 + 95_158_272 + 11_534_336 + 155_189_248
    experts = 3_045_064_704
    assert stage_parameters(air, arch, 0) == Parameters(dense=dense, experts=experts, biases=22 * 128)
    last = stage_parameters(air, arch, 1)
    assert last.experts == experts * 23 // 22
    assert last.dense - dense == 4096 + (95_158_272 + 11_534_336) // 22 - 33_619_968
    assert (dense_ranks(air), expert_ranks(air)) == (4, 1)
    memory = stage_memory(air, arch, 0, on_cuda=True)
    assert memory.weights == 2 * (dense + experts) + 2 * 4 * 22 * 128
    assert memory.optimizer == 12 * (dense // 4 + experts)
    # all ranks together hold each expert once, and what belongs to every tensor-parallel rank four times
    whole = 4 * (dense + last.dense) + 16 * (experts + last.experts)
    routers_and_norms = 45 * 128 * 4096 + 46 * 2 * 4096 + 4096
    assert whole == arch.num_parameters() + 3 * routers_and_norms


def test_tokens_of_experts(qwen: Args) -> None:
    """8192 tokens on 4 ranks are 2048 a rank, each for 8 experts: 16,384 copies, which balanced ranks receive too."""
    arch = architecture(qwen)

    def rank(**more: Any) -> Any:
        return rank_sizes(replace(qwen, **more), arch, on_cuda=True)

    one = rank()
    assert (one.rows, one.sent, one.received, one.experts, one.expert_ffn) == (2048, 16384, 16384, 16, 768)
    # the ranks of a cut expert all get its tokens, of which there are as many on each
    cut = rank(expert_tensor_parallel_size=4, expert_model_parallel_size=2)
    assert (cut.sent, cut.received, cut.experts, cut.expert_ffn) == (16384, 65536, 64, 192)
    rows = moe_operations(one)
    kept = {row.name: row.saved for row in rows if row.name.startswith("experts")}
    assert kept == {
        "experts: their tokens": 16384 * (2 * 2048 + 4),  # with a weight in fp32
        "experts: gate and up": 16384 * 2 * 2 * 768,
        "experts: weighted product": 16384 * 2 * 768,
    }


def test_layers_of_virtual_stages(air: Args) -> None:
    small = replace(architecture(air), num_layers=8, first_dense_layers=3)
    args = replace(air, architecture=small)
    assert stage_layer_numbers(args, small) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    virtual = replace(args, num_virtual_stages_per_pipeline_rank=2)
    assert stage_layer_numbers(virtual, small) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    uneven = replace(args, decoder_last_pipeline_num_layers=2)
    assert stage_layer_numbers(uneven, small) == [[0, 1, 2, 3, 4, 5], [6, 7]]
    # two of three dense layers on the first stage, and one on the second
    experts = [stage_parameters(virtual, small, stage).experts for stage in range(2)]
    assert experts[0] * 3 == experts[1] * 2


def test_engines_with_expert_parallelism_hold_as_much(qwen: Args) -> None:
    whole = engine_of(qwen)
    assert engine_of(replace(qwen, sglang={**qwen.sglang, "ep_size": 4})) == whole
    alone = engine_of(replace(qwen, rollout_num_gpus_per_engine=1))
    assert alone.weights == 2 * architecture(qwen).num_parameters()


def test_a_plan_shows_the_experts(qwen: Args, air: Args) -> None:
    text = format_plan(qwen, [])
    assert "qwen3_moe, 30,532.1 M parameters, 3,353.0 M of them for each token" in text
    assert "128 of 768 channels in all layers, 8 for each token" in text
    assert "PP 1, experts EP 8, TP 1" in text
    assert "not estimated" not in text
    assert "128 of 1408 channels in the last 45 layers, 8 for each token, and a shared one of 1408" in format_plan(
        air, []
    )
    rows = memory_of(qwen)
    assert "a share of 1/2 (of experts 1/1)" in rows["optimizer"]
    assert "if every expert gets equally many tokens" in rows["activations"]
    one_share = replace(qwen, expert_model_parallel_size=4)
    assert "a share of 1/2: --use" in memory_of(one_share)["optimizer"]


def test_what_would_make_experts_fit(qwen: Args) -> None:
    """With fewer ranks for the experts the plan is too large, and more of them are one of the proposals."""
    assert memory_problems(qwen, []) == []
    few = replace(qwen, expert_model_parallel_size=1)
    assert fullest(moments(few, 139.8)).share > 1
    [problem] = memory_problems(few, [])
    assert problem.severity == "error"
    assert "--expert-model-parallel-size 4: " in problem.remedy  # 2 is not enough
    assert "--tensor-model-parallel-size 16" not in problem.remedy
