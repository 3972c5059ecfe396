"""Plans of small runs, without files."""

from __future__ import annotations

from typing import Any

from slime.config.args import Args
from slime.core.architecture import Architecture

ARCHITECTURE = Architecture(
    family="llama",
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=256,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=32,
    vocab_size=512,
    max_position_embeddings=4096,
    norm_epsilon=1e-6,
    rotary_base=10_000.0,
)


def plan_args(**changes: Any) -> Args:
    """Return the Args of 4 prompts x 2 samples on one engine and one trainer; `changes` replace some."""
    values: dict[str, Any] = {
        "architecture": ARCHITECTURE,
        "rollout_batch_size": 4,
        "n_samples_per_prompt": 2,
        "over_sampling_batch_size": changes.get("rollout_batch_size", 4),
        "rollout_max_response_len": 64,
        "rollout_num_gpus": 1,
        "actor_num_gpus_per_node": 1,
        "num_steps_per_rollout": 2,
        "global_batch_size": 4,
        "rollout_engine": "embedded",
        "colocate": False,
        "offload": False,
        "micro_batch_size": 1,
    }
    return Args(**values | changes)
