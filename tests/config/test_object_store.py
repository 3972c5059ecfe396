"""The bytes of a rollout in Ray's object store: an upper bound that is not far off, and a store that holds it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from slime.config.args import Args
from slime.config.object_store import LEAST, local_store, rollout_bytes, shortage
from slime.core.architecture import Architecture
from slime.core.batch import TrainBatch
from slime.core.packing import plan_steps
from slime.core.rank_batch import rank_batches

MIXTURE = Architecture(
    family="qwen3_moe",
    num_layers=6,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=151_936,
    max_position_embeddings=320,
    norm_epsilon=1e-6,
    rotary_base=1e6,
    qk_layernorm=True,
    tied_embeddings=True,
    num_experts=128,
    moe_router_topk=4,
    moe_ffn_hidden_size=24,
)
ARGS = Args(
    architecture=MIXTURE,
    rollout_batch_size=16,
    n_samples_per_prompt=4,
    rollout_max_response_len=256,
    actor_num_gpus_per_node=4,
    use_routing_replay=True,
)


@pytest.mark.parametrize("replays", [False, True])
def test_a_rollout_of_full_length_is_as_large(replays: bool) -> None:
    rows, total, response = 64, 320, 256
    chance = np.random.default_rng(0)
    columns = {
        "tokens": chance.integers(0, 151_936, rows * total),
        "loss_mask": np.ones(rows * response, dtype="float32"),
        "rewards": chance.random(rows).astype("float32"),
        "group_indices": np.arange(rows),
        "sample_indices": np.arange(rows),
        "rollout_log_probs": -chance.random(rows * response).astype("float32"),
        "policy_versions": np.full(rows * response, 1_000, dtype="int32"),
    }
    if replays:
        columns["routed_experts"] = chance.integers(-1, 128, (rows * total, 6, 4)).astype("int16")
    batch = TrainBatch(np.full(rows, total), np.full(rows, response), columns)
    plans = plan_steps([total] * rows, num_steps=1, dp_size=4, max_tokens=None, micro_batch_size=1)
    real = sum(part.num_bytes for part in rank_batches(batch, plans))
    args = replace(ARGS, use_routing_replay=replays)
    assert real <= rollout_bytes(args) < 1.05 * real
    assert rollout_bytes(replace(args, rollouts_ahead=1)) == 2 * rollout_bytes(args)


def test_a_local_store_holds_a_rollout() -> None:
    assert local_store(ARGS, 20 * LEAST) == LEAST, "small rollouts have a store of the usual size"
    large = replace(ARGS, rollout_batch_size=65_536)
    need = rollout_bytes(large)
    assert LEAST < need < local_store(large, 20 * LEAST) < 1.5 * need
    assert local_store(large, 20 * LEAST) < 20 * LEAST
    assert shortage(large, local_store(large, 20 * LEAST)) is None
    cramped = local_store(large, LEAST)
    warning = shortage(large, cramped)
    assert cramped == LEAST and warning is not None and "--object-store-memory" in warning
    assert shortage(replace(large, debug_rollout_only=True), cramped) is None, "nothing goes to trainers"
