"""The policy of the run's own router follows from the lengths of prompts and responses."""

from __future__ import annotations

from typing import Any

import pytest

from slime.config.args import Args
from slime.config.router_policy import router_policy, with_router_policy

EIGHT: dict[str, Any] = {
    "rollout_engine": "sglang",
    "rollout_num_gpus": 8,
    "rollout_num_gpus_per_engine": 1,
    "n_samples_per_prompt": 8,
    "rollout_max_response_len": 21_000,
}


@pytest.mark.parametrize(
    ("changes", "tokens", "name", "why"),
    [
        ({}, 12_000, "cache_aware", "it saves 10,500 tokens of prefill for each sample, whose response has up to"),
        ({}, 11_900, "round_robin", "cache_aware would save only 10,412 tokens of prefill for each sample"),
        ({"rollout_max_response_len": 20_000}, 11_900, "cache_aware", "it saves 10,412 tokens"),
        ({"rollout_num_gpus": 2}, 50_000, "round_robin", "cache_aware would save only 6,250 tokens"),
        ({"n_samples_per_prompt": 1}, 50_000, "round_robin", "cache_aware would save only 0 tokens"),
        ({"rollout_num_gpus": 1}, 50_000, "round_robin", "there is only one engine"),
        ({"rollout_num_gpus_per_engine": 8}, 50_000, "round_robin", "there is only one engine"),
        ({}, None, "round_robin", "the length of prompts is not known"),
        ({"custom_generate_function_path": "a.b"}, 10, "cache_aware", "--custom-generate-function-path may have"),
        ({"rollout_engine": "embedded"}, 50_000, "round_robin", "engines do not keep a prompt for other samples"),
        ({"sglang": {"disable_radix_cache": True}}, 50_000, "round_robin", "engines do not keep a prompt"),
        ({"router": {"policy": "random"}}, 50_000, "random", "--router-policy"),
    ],
)
def test_policy_follows_from_saved_prefill(changes: dict[str, Any], tokens: int | None, name: str, why: str) -> None:
    policy = router_policy(Args(**{**EIGHT, **changes}), tokens)
    assert policy.name == name
    assert policy.why.startswith(why)
    assert policy.settings.get("policy") in (None, name)


def test_settings_of_the_user_stay() -> None:
    args = Args(**EIGHT, router={"cache_threshold": 0.4, "log_level": "info"})
    chosen = with_router_policy(args, router_policy(args, 50_000)).router
    assert chosen == {
        "policy": "cache_aware",
        "cache_threshold": 0.4,
        "balance_abs_threshold": 16,
        "balance_rel_threshold": 1.1,
        "log_level": "info",
    }
    plain = Args(**EIGHT)
    assert with_router_policy(plain, router_policy(plain, 10)).router == {}
