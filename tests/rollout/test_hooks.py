"""Every hook of the rollout is called in its place, with the parameters that the table declares."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import rollout_hooks_for_tests as hooks
from transformers import PreTrainedTokenizerFast

from slime.config.args import Args
from slime.core.plugins import HOOKS, load_hook
from slime.rollout.context import DataSource, RolloutContext, RolloutResult

PROBES = {
    "custom_generate_function_path": hooks.generate,
    "custom_rm_path": hooks.reward,
    "dynamic_sampling_filter_path": hooks.dynamic_filter,
    "buffer_filter_path": hooks.buffer_filter,
    "rollout_sample_filter_path": hooks.sample_filter,
    "custom_reward_post_process_path": hooks.post_process,
}


def test_hooks_are_called_as_the_table_declares(
    run_with_engines: Callable[..., Any], data_file: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> None:
    paths: dict[str, Any] = {name: f"{probe.__module__}.{probe.__name__}" for name, probe in PROBES.items()}
    for name, probe in PROBES.items():
        assert tuple(inspect.signature(probe).parameters) == HOOKS[name].parameters
    args = Args(
        prompt_data=data_file([{"prompt": f"question {number}"} for number in range(8)]),
        rollout_batch_size=2,
        n_samples_per_prompt=2,
        over_sampling_batch_size=4,
        rollout_max_response_len=5,
        rm_num_workers=1,
        **paths,
    )
    hooks.CALLS.clear()
    data_source = load_hook("data_source_path", args.data_source_path)(args, tokenizer)
    rollout = load_hook("rollout_function_path", args.rollout_function_path)

    async def work(context: RolloutContext) -> list[RolloutResult]:
        return [await rollout(args, rollout_id, data_source, context) for rollout_id in (5, 6)]

    results = run_with_engines(args, work)
    calls = Counter(name for name, _ in hooks.CALLS)
    assert calls["generate"] >= 8
    assert calls["dynamic_filter"] == 4  # two kept groups in each rollout; groups that finish later are surplus
    assert [what for name, what in hooks.CALLS if name == "sample_filter"] == [4, 4]
    assert [what for name, what in hooks.CALLS if name == "post_process"] == [4, 4]
    assert [what for name, what in hooks.CALLS if name == "buffer_filter"] == [(6, 2, 4)]
    samples = [sample for result in results for group in result.groups for sample in group]
    assert [sample.reward for sample in samples] == [-float(sample.index) for sample in samples]
    assert not [name for result in results for name in result.metrics if name.startswith("rollout/reward_failed")]


def test_a_data_source_requires_all_protocol_members() -> None:
    declared = {name for name in vars(DataSource) if not name.startswith("_")}
    assert set(HOOKS["data_source_path"].members) == declared
    message = (
        r"--data-source-path rollout_hooks_for_tests\.NoPrompts: it lacks num_prompts, add_groups; .*load_state_dict"
    )
    with pytest.raises(ValueError, match=message):
        load_hook("data_source_path", "rollout_hooks_for_tests.NoPrompts")
    assert load_hook("data_source_path", "rollout_hooks_for_tests.Declared") is hooks.Declared
    assert load_hook("data_source_path", "rollout_hooks_for_tests.Inherited") is hooks.Inherited
