"""The one table of hooks, and the check of the user code that they name.

- Used by: `config.rules` checks the path and signature of every hook before anything starts with `load_hook`; the place
  that calls a hook gets it from `hook_function`.
- Invariant: a hook is called with exactly the parameters that HOOKS declares. What it raises becomes a HookFailed,
  which every process can read, whatever the hook's own exception needs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from slime.core.errors import RunError
from slime.core.printable import one_line, printable
from slime.core.user_code import FORMS, described, load, place_of

T = TypeVar("T")


@dataclass(frozen=True)
class Hook:
    """A place for user code. `parameters` are positional, in order; `returns` describes the result."""

    flag: str
    parameters: tuple[str, ...]
    returns: str
    called: str
    example: str
    """The dotted path of a working example, whose code the documentation shows."""
    may_be_async: bool = False
    is_class: bool = False
    members: tuple[str, ...] = ()
    """The members that a class must have."""
    group_parameters: tuple[str, ...] = ()
    """The parameters under --group-rm, if they are different."""


HOOKS: Mapping[str, Hook] = {
    "rollout_function_path": Hook(
        "--rollout-function-path",
        ("args", "rollout_id", "data_source", "context"),
        "slime.rollout.context.RolloutResult",
        "once per rollout; `context` is a slime.rollout.context.RolloutContext (client, tokenizer, rewards)",
        "examples.hooks.rollouts.count_right",
        may_be_async=True,
    ),
    "eval_function_path": Hook(
        "--eval-function-path",
        ("args", "rollout_id", "context"),
        "dict[str, float], the metrics",
        "once per evaluation, while the next rollout is generated",
        "examples.hooks.rollouts.evaluate_twice",
        may_be_async=True,
    ),
    "data_source_path": Hook(
        "--data-source-path",
        ("args", "tokenizer"),
        "a slime.rollout.context.DataSource: num_prompts, get_groups(num, rollout_id=...), add_groups(groups), "
        "state_dict(), load_state_dict(state)",
        "once, at the start",
        "examples.hooks.rollouts.EasyFirst",
        is_class=True,
        members=("num_prompts", "get_groups", "add_groups", "state_dict", "load_state_dict"),
    ),
    "custom_generate_function_path": Hook(
        "--custom-generate-function-path",
        ("args", "sample", "sampling_params", "context"),
        "Sample",
        "once per sample",
        "examples.tool_use.calculator.generate",
        may_be_async=True,
    ),
    "custom_rm_path": Hook(
        "--custom-rm-path",
        ("args", "sample"),
        "float, or dict with one (--reward-key names it) and plain data; with --group-rm a list of them, in order",
        "once per finished sample, in a worker process; with --group-rm once per group, with its finished samples",
        "examples.rewards.own_rewards.short_and_right",
        may_be_async=True,
        group_parameters=("args", "samples"),
    ),
    "dynamic_sampling_filter_path": Hook(
        "--dynamic-sampling-filter-path",
        ("args", "samples"),
        "bool, 0-d tensor, or an object with `keep` and `reason`",
        "once per finished group, with **kwargs",
        "examples.hooks.filters.not_too_easy",
    ),
    "buffer_filter_path": Hook(
        "--buffer-filter-path",
        ("args", "rollout_id", "buffer", "num_samples"),
        "list[list[Sample]]; `buffer` is changed in place, `num_samples` counts groups",
        "before a rollout draws new prompts",
        "examples.hooks.filters.newest_first",
    ),
    "rollout_sample_filter_path": Hook(
        "--rollout-sample-filter-path",
        ("args", "samples"),
        "None; zeroes loss_mask in place",
        "once per full rollout",
        "examples.hooks.filters.no_truncated",
    ),
    "custom_reward_post_process_path": Hook(
        "--custom-reward-post-process-path",
        ("args", "samples"),
        "list[float], the training reward of each sample",
        "once per full rollout",
        "examples.hooks.training.minus_length",
    ),
    "custom_advantage_function_path": Hook(
        "--custom-advantage-function-path",
        ("args", "batch"),
        "float32 array [R], the `advantages` column",
        "once per rollout, in every trainer",
        "examples.hooks.training.reward_minus_mean",
    ),
    "custom_loss_function_path": Hook(
        "--custom-loss-function-path",
        ("inputs", "options"),
        "(loss [R], dict of per-token metrics [R]), like slime.algo.losses.policy_loss",
        "once per micro-batch",
        "examples.hooks.training.reinforce",
    ),
    "spec": Hook(
        "--spec",
        ("args", "config"),
        "megatron's ModuleSpec of one transformer layer; slime.megatron.layers.built_in_layer_spec returns the one it "
        "replaces, `config` is megatron's TransformerConfig",
        "once, when the model is built",
        "examples.custom_layer.lean_mlp.layer_spec",
    ),
    "custom_convert_samples_to_train_data_path": Hook(
        "--custom-convert-samples-to-train-data-path",
        ("args", "samples"),
        "slime.core.batch.TrainBatch",
        "once per rollout",
        "examples.hooks.training.only_judged",
    ),
    "custom_rollout_log_function_path": Hook(
        "--custom-rollout-log-function-path",
        ("args", "rollout_id", "samples", "metrics"),
        "None",
        "once per rollout",
        "examples.hooks.rollouts.log_longest",
    ),
}


def hook_path(value: str | tuple[str, ...] | None) -> str | None:
    """Return the path in a hook's flag, or None; --spec has module (or file) and function as two words."""
    if not isinstance(value, tuple):
        return value
    return (":" if value[:1] and value[0].endswith(".py") else ".").join(value) or None


class HookError(ValueError):
    """A hook that cannot be used; the text names its flag, its path, the rule and the remedy."""

    def __init__(self, flag: str, path: str, rule: str, remedy: str) -> None:
        super().__init__(flag, path, rule, remedy)
        self.flag, self.path, self.rule, self.remedy = flag, path, rule, remedy

    def __str__(self) -> str:
        return f"{self.flag} {printable(self.path)}: {one_line(self.rule)}; {self.remedy}"


def load_class(path: str, base: type[T], *, chosen_by: str) -> type[T]:
    """Return the subclass of `base` at a dotted path.

    Args:
        path: the path that the row of a table names.
        base: the class that every row's class extends.
        chosen_by: the flag and the value that chose the row, for the error.

    Raises:
        ValueError: nothing can be imported from there, or it is no such class.
    """
    found = load(path)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{chosen_by}: {path} is not a {base.__name__}")
    return found


def check_signature(hook: Hook, function: Callable[..., Any]) -> str | None:
    """Return why `function` cannot be called as `hook` declares, or None if it can."""
    kind = f"an object of type {type(function).__name__}"
    if not callable(function):
        return f"{kind} cannot be called"
    if hook.is_class and not inspect.isclass(function):
        return f"{kind} is not a class"
    if inspect.iscoroutinefunction(function) and not hook.may_be_async:
        return f"it is async; {hook.flag} is called as a plain function"
    try:
        inspect.signature(function).bind(*hook.parameters)
    except Exception as error:  # noqa: BLE001 (built-in functions may have no signature, and objects any of their own)
        return f"it cannot be called as ({', '.join(hook.parameters)}): {error}"
    missing = [name for name in hook.members if not _has_member(function, name)]
    return f"it lacks {', '.join(missing)}" if missing else None


def _has_member(function: Callable[..., Any], name: str) -> bool:
    """Return whether a class has the member: defined, inherited, or declared for its instances (`num_prompts: int`)."""
    classes = inspect.getmro(function) if inspect.isclass(function) else ()
    return any(name in vars(base) or name in inspect.get_annotations(base) for base in classes)


def load_hook(name: str, path: str) -> Callable[..., Any]:
    """Return the function for the hook `name` (a key of HOOKS), after checking its signature.

    Raises:
        HookError: it cannot be imported, or cannot be called with the hook's parameters.
    """
    hook = HOOKS[name]
    try:
        function = load(path)
    except ValueError as error:
        raise HookError(hook.flag, path, str(error), f"name a function as {FORMS}") from error
    problem = check_signature(hook, function)
    if problem is not None:
        remedy = f"give it the parameters ({', '.join(hook.parameters)})"
        if hook.members:
            remedy += f" and the members {', '.join(hook.members)}"
        raise HookError(hook.flag, path, problem, remedy)
    return function


class HookFailed(RunError):
    """A hook raised an error; the text names flag, path, the error and its place. The error itself is the cause."""


@contextmanager
def hook_errors(name: str, path: str) -> Generator[None]:
    """Turn what the hook `name` (a key of HOOKS) raises in the block, even SystemExit, into a HookFailed.

    Errors of slime and torch pass: a lost engine or a lost peer is not the hook's fault. So do those of built-in hooks.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if path.startswith("slime.") or type(error).__module__.partition(".")[0] in ("slime", "torch"):
            raise
        raise hook_failed(name, path, error) from error


def hook_failed(name: str, path: str, error: BaseException) -> HookFailed:
    """Return the HookFailed for an error that the hook `name` raised."""
    place = place_of(error)
    where = "" if place is None else f" ({place})"
    return HookFailed(f"{HOOKS[name].flag} {printable(path)}: it raised {described(error)}{where}")


def hook_function(name: str, path: str) -> Callable[..., Any]:
    """Return the function for the hook `name` as `load_hook` does; what it raises when it is called is a HookFailed."""
    function = load_hook(name, path)
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def call_async(*arguments: Any) -> Any:
            with hook_errors(name, path):
                return await function(*arguments)

        return call_async

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        with hook_errors(name, path):
            return function(*arguments)

    return call
