"""Errors of hooks that no other process can read arrive as text, from every hook, and are no faults."""

from __future__ import annotations

import asyncio
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from failing_hooks_for_tests import NotFoundError, fail

from slime.cluster.on_ray.portable import portable, portable_errors
from slime.cluster.on_ray.ray_wait import is_broken_link
from slime.cluster.rollout_manager import RolloutManager
from slime.config.args import Args
from slime.core.errors import Fault, RunError
from slime.core.plugins import HOOKS, HookFailed
from slime.core.sample import Sample, Status
from slime.engine.client import EngineError
from slime.megatron.advantages import advantages_by_hook, loss_of
from slime.megatron.model.layers import layer_spec
from slime.rollout.acceptance import Acceptance, post_process
from slime.rollout.dump import write_dump
from tests.cluster.runs import Task

FAILING = "failing_hooks_for_tests"


def reread(error: BaseException) -> BaseException:
    return pickle.loads(pickle.dumps(error))


def test_only_readable_errors_stay_as_they_are() -> None:
    with pytest.raises(TypeError, match="response"):  # control
        reread(NotFoundError("gone", response=404))
    for error in (
        Fault("lost"),
        ValueError("--flag: x"),
        EngineError("http://x", 500, "y"),
        RuntimeError("gloo/transport"),
    ):
        assert portable(error) is error
        assert type(reread(error)) is type(error)
    assert is_broken_link(portable(RuntimeError("gloo/transport closed")))
    for unreadable in (NotFoundError("gone", response=404), SystemExit("bye"), asyncio.CancelledError()):
        told = reread(portable(unreadable))
        assert type(told) is RunError
        assert str(told) == f"{type(unreadable).__name__}: {unreadable}"


def test_actors_log_tracebacks_and_raise_readable_errors(caplog: pytest.LogCaptureFixture) -> None:
    class Actor:
        def plain(self, what: str) -> Any:
            return fail(what)

        async def waiting(self, *, what: str) -> Any:
            sys.exit(what)

        def works(self) -> int:
            return 3

        def _inner(self) -> Any:
            return fail()

    made = portable_errors(Actor)()
    assert made.works() == 3
    with pytest.raises(
        RunError, match=r"^NotFoundError: no such model: judge-7 \(.*failing_hooks_for_tests.py:\d+ in fail\)$"
    ):
        made.plain("x")
    assert "plain failed" in caplog.text and "in plain\n    return fail(what)" in caplog.text
    with pytest.raises(RunError, match=r"^SystemExit: bye"):
        asyncio.run(made.waiting(what="bye"))
    with pytest.raises(NotFoundError):
        made._inner()


def samples() -> list[Sample]:
    return [
        Sample(tokens=[1, 2], prompt_length=1, response_length=1, reward=float(number), status=Status.COMPLETED)
        for number in range(2)
    ]


def in_manager(call: Callable[[RolloutManager], Any]) -> Callable[[Task, Path, dict[str, Any]], Any]:
    def run(task: Task, directory: Path, hook: dict[str, Any]) -> Any:
        write_dump(directory / "0.jsonl", [samples()])
        manager = RolloutManager(Args(hf_checkpoint=str(task.model), save=str(directory), **hook), str(directory))
        try:
            manager.start()
            return call(manager)
        finally:
            asyncio.run(manager.close())

    return run


def replayed(task: Task, directory: Path, hook: dict[str, Any]) -> Any:
    hook = {**hook, "load_debug_rollout_data": str(directory / "{rollout_id}.jsonl")}
    return in_manager(lambda manager: asyncio.run(manager.generate(0)))(task, directory, hook)


def in_trainer(call: Callable[[Args], Any]) -> Callable[[Task, Path, dict[str, Any]], Any]:
    return lambda task, directory, hook: call(Args(hf_checkpoint=str(task.model), **hook))


def with_samples(call: Callable[[Args, list[Sample]], Any]) -> Callable[[Task, Path, dict[str, Any]], Any]:
    return lambda task, directory, hook: call(Args(**hook), samples())


def filled_buffer(task: Task, directory: Path, hook: dict[str, Any]) -> Any:
    def draw(manager: RolloutManager) -> Any:
        source = manager._data._source
        assert source is not None
        source.add_groups(source.get_groups(1, rollout_id=0))
        return source.get_groups(1, rollout_id=0)

    data = {"prompt_data": str(task.train), "apply_chat_template": True}
    return in_manager(draw)(task, directory, {**hook, **data})


CALLS: dict[str, Callable[[Task, Path, dict[str, Any]], Any]] = {
    "rollout_function_path": in_manager(lambda manager: asyncio.run(manager.generate(0))),
    "eval_function_path": in_manager(lambda manager: asyncio.run(manager.evaluate(0))),
    "data_source_path": in_manager(lambda manager: None),
    "dynamic_sampling_filter_path": with_samples(lambda args, samples: Acceptance(args).drop_reason(samples)),
    "buffer_filter_path": filled_buffer,
    "rollout_sample_filter_path": with_samples(post_process),
    "custom_reward_post_process_path": with_samples(post_process),
    "custom_advantage_function_path": in_trainer(
        lambda args: advantages_by_hook(args, str(args.custom_advantage_function_path), None)  # pyright: ignore[reportArgumentType]
    ),
    "custom_loss_function_path": in_trainer(lambda args: loss_of(args)(None, None)),  # pyright: ignore[reportArgumentType]
    "spec": in_trainer(lambda args: layer_spec(args, None)),  # pyright: ignore[reportArgumentType]
    "custom_convert_samples_to_train_data_path": replayed,
    "custom_rollout_log_function_path": replayed,
}
"""How each hook is called; a failing generate function and a failing reward cost their sample (tests/rollout)."""


@pytest.mark.parametrize("name", HOOKS)
def test_every_hooks_own_error_is_readable(name: str, task: Task, tmp_path: Path) -> None:
    if name in ("custom_generate_function_path", "custom_rm_path"):
        assert name not in CALLS
        return
    hook: dict[str, Any] = {name: f"{FAILING}.{'Failing' if name == 'data_source_path' else 'fail'}"}
    if name == "spec":
        hook = {name: (FAILING, "fail")}
    if name == "custom_loss_function_path":
        hook["loss_type"] = "custom_loss"
    with pytest.raises(HookFailed) as raised:
        CALLS[name](task, tmp_path, hook)
    told = reread(raised.value)
    assert isinstance(told, RunError) and not isinstance(told, Fault)
    assert str(told).startswith(f"{HOOKS[name].flag} {FAILING}.")
    assert "it raised NotFoundError: no such model: judge-7 (" in str(told)
    assert f"{FAILING}.py:" in str(told)
