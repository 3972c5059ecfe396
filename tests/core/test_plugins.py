"""The table of hooks: each hook has a test in which the real caller calls it, and an example that works.

The function that such a test installs (its probe) takes the declared parameters and no others, so that a call with
anything else fails. This file reads the tests; it does not run them.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from slime.core.plugins import HOOKS, HookError, check_signature, hook_path, load_hook
from slime.core.user_code import load

TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Contract:
    """`test` in `file` makes the caller call the hook; `probe` is in `probes` (None: in `file`)."""

    file: str
    test: str
    probe: str
    probes: str | None = None


def in_rollout(probe: str) -> Contract:
    test = "test_hooks_are_called_as_the_table_declares"
    return Contract("rollout/test_hooks.py", test, probe, "rollout/rollout_hooks_for_tests.py")


def in_manager(test: str, probe: str, file: str = "cluster/test_rollout_manager.py") -> Contract:
    return Contract(file, test, probe, "cluster/hooks_for_tests.py")


CONTRACTS = {
    "rollout_function_path": in_manager("test_a_custom_rollout_function", "roll", "cluster/test_manager_hooks.py"),
    "eval_function_path": in_manager("test_a_custom_evaluation_function", "evaluate"),
    "data_source_path": in_manager("test_a_users_data_source_is_used_and_restored", "Numbers"),
    "custom_generate_function_path": in_rollout("generate"),
    "custom_rm_path": in_rollout("reward"),
    "dynamic_sampling_filter_path": in_rollout("dynamic_filter"),
    "buffer_filter_path": in_rollout("buffer_filter"),
    "rollout_sample_filter_path": in_rollout("sample_filter"),
    "custom_reward_post_process_path": in_rollout("post_process"),
    "custom_advantage_function_path": Contract("megatron/test_trainer.py", "test_hooks", "constant_advantages"),
    "custom_loss_function_path": Contract("megatron/test_trainer.py", "test_hooks", "doubled_likelihood"),
    "spec": Contract(
        "megatron/test_layers.py",
        "test_another_layer_shows_in_the_logprob_gap",
        "clamped",
        "megatron/specs_for_tests.py",
    ),
    "custom_convert_samples_to_train_data_path": in_manager(
        "test_the_log_and_conversion_hooks_are_called", "first_two"
    ),
    "custom_rollout_log_function_path": in_manager("test_the_log_and_conversion_hooks_are_called", "log_rollout"),
}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definitions(file: str) -> dict[str, Definition]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, Definition)}


def parameters(probe: Definition) -> tuple[str, ...]:
    """Return the parameters of a function, or of a class's constructor without `self`; "*" if it takes others too."""
    if isinstance(probe, ast.ClassDef):
        [init] = [node for node in probe.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
        return parameters(init)[1:]
    more = probe.args.vararg or probe.args.kwarg or probe.args.kwonlyargs
    return (*(argument.arg for argument in probe.args.args), *(["*"] if more else []))


def fault(name: str, contract: Contract) -> str | None:
    """Return what is wrong with the test of a hook, or None."""
    tests, probes = definitions(contract.file), definitions(contract.probes or contract.file)
    if contract.test not in tests:
        return f"{contract.file} has no {contract.test}"
    if contract.probe not in probes:
        return f"there is no {contract.probe}"
    found, declared = parameters(probes[contract.probe]), HOOKS[name].parameters
    if found != declared:
        return f"{contract.probe} takes {found}, declared are {declared}"
    if contract.probe not in (TESTS / contract.file).read_text(encoding="utf-8"):
        return f"{contract.file} never names {contract.probe}"
    return None


def test_every_hook_has_a_contract_test() -> None:
    assert CONTRACTS.keys() == HOOKS.keys()


@pytest.mark.parametrize("name", HOOKS)
def test_probes_take_exactly_the_declared_parameters(name: str) -> None:
    assert fault(name, CONTRACTS[name]) is None


def test_a_broken_contract_is_noticed() -> None:
    """Control: another hook's probe, a probe that takes anything, and a test that does not exist."""
    contract = CONTRACTS["custom_rm_path"]
    assert "declared are" in str(fault("buffer_filter_path", contract))
    assert "'*'" in str(
        fault("custom_rm_path", replace(contract, probe="group", probes="rollout/rewards_for_tests.py"))
    )
    assert "has no" in str(fault("custom_rm_path", replace(contract, test="test_gone")))


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_an_example_that_fits(name: str) -> None:
    hook = HOOKS[name]
    assert hook.example.startswith("examples.")
    assert check_signature(hook, load(hook.example)) is None


async def asynchronous(args: Any, samples: Any) -> None: ...


def too_few(args: Any) -> None: ...


def like_a_source(args: Any, tokenizer: Any) -> None: ...


class Incomplete:
    num_prompts: int

    def __init__(self, args: Any, tokenizer: Any) -> None: ...

    def state_dict(self) -> None: ...


@pytest.mark.parametrize(
    ("name", "function", "reason"),
    [
        ("custom_rm_path", 3, "an object of type int cannot be called"),
        ("data_source_path", like_a_source, "an object of type function is not a class"),
        ("rollout_sample_filter_path", asynchronous, "it is async; --rollout-sample-filter-path is called as a plain"),
        ("rollout_sample_filter_path", too_few, "it cannot be called as (args, samples): too many positional"),
        ("data_source_path", Incomplete, "it lacks get_groups, add_groups, load_state_dict"),
    ],
)
def test_unusable_hooks_have_a_reason(name: str, function: Any, reason: str) -> None:
    found = check_signature(HOOKS[name], function)
    assert found is not None and found.startswith(reason), found


def test_an_unusable_hook_names_flag_and_remedy() -> None:
    assert load_hook("custom_loss_function_path", "slime.algo.losses.policy_loss") is load(
        "slime.algo.losses.policy_loss"
    )
    with pytest.raises(
        HookError, match=r"--custom-rm-path none\.x: importing none failed: .*; name a function as package"
    ):
        load_hook("custom_rm_path", "none.x")
    with pytest.raises(
        HookError, match=r"--data-source-path .*: .* is not a class; give it the .* members num_prompts"
    ):
        load_hook("data_source_path", "examples.hooks.training.only_judged")


def test_the_path_in_a_flag() -> None:
    assert hook_path(None) is None and hook_path(("",)) is None
    assert hook_path("a.b") == "a.b" and hook_path(("a.b", "c")) == "a.b.c"
    assert hook_path(("a/b.py", "c")) == hook_path(("a/b.py:c",)) == "a/b.py:c"
