"""Simulated rollouts: the real collector, data buffer and waves, with timed engines and rewards that only take time.

- Used by: `loop`.
- Invariant: what is drawn, kept, dropped, aborted and continued is decided by `slime.rollout`. This file only makes
  what that needs, in units of `grain` tokens: prompts of a single token, no tokenizer, and rewards.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

from slime.config.args import SFT_ROLLOUT, Args, FrozenMapping
from slime.config.flags.rollout_options import HookOptions
from slime.config.problem import Problem, UsageError
from slime.core.columns import Array
from slime.core.sample import Sample
from slime.rollout.collect import generate_rollout
from slime.rollout.context import RolloutContext, RolloutResult
from slime.rollout.data_buffer import DataBuffer
from slime.rollout.prompts import Prompt, PromptSet
from slime.rollout.reward_pool.pool import RewardPool
from slime.rollout.reward_pool.verdict import Verdict
from slime.rollout.token_text import TokenText
from slime.simulate.engines import END, FIRST_PROMPT, TimedEngines

MOST_UNITS = 128
"""The largest number of units of a response, which bounds memory and time of a simulation."""
NUM_PROMPTS = 4096
"""The prompts of a simulated epoch."""
FILTER = "slime.simulate.rollouts.drop_some"
NO_HOOKS = {
    "custom_generate_function_path": None,
    "buffer_filter_path": None,
    "rollout_sample_filter_path": None,
    "custom_reward_post_process_path": None,
    "custom_rm_path": None,
}


def grain_of(args: Args) -> int:
    """Return the tokens of one unit: 1, or more if responses may be longer than MOST_UNITS."""
    return -(-args.rollout_max_response_len // MOST_UNITS)


def simulated_args(args: Args, grain: int) -> Args:
    """Return the run's Args in units of `grain` tokens, without hooks, data and model files."""
    most = args.partial_rollout_max_tokens
    return replace(
        args,
        **NO_HOOKS,
        rollout_max_response_len=max(1, args.rollout_max_response_len // grain),
        partial_rollout_max_tokens=None if most is None else max(1, most // grain),
        rollout_max_context_len=None,
        architecture=None,
        sglang=FrozenMapping(),
        rollout_stop=(),
        rollout_stop_token_ids=(),
        use_routing_replay=False,
        group_rm=False,
        rollout_shuffle=False,
        prompt_data_weights=(),
        dynamic_sampling_filter_path=FILTER if args.simulate_drop_rate else None,
    )


def drop_some(args: Args, samples: list[Sample]) -> bool:
    """Keep a group, as a dynamic filter, except for a share of --simulate-drop-rate."""
    first = samples[0]
    began = first.metadata["start_rollout_id"]
    drawn = random.Random(first.group_index * 1_000_003 + began).random()
    return drawn >= (args.simulate_drop_rate or 0.0)


@cache
def simulated_prompts() -> PromptSet:
    """Return prompts of a single token, which is the prompt's number after FIRST_PROMPT."""
    prompts = [Prompt("", None, [FIRST_PROMPT + number], {}, {}) for number in range(NUM_PROMPTS)]
    return PromptSet("simulated", prompts, [NUM_PROMPTS], "", "")


class SimulatedRewards(RewardPool):
    """Rewards of 0 or 1 that take `seconds` each; any number are computed at once, and no process is started."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    @property
    def by_group(self) -> bool:
        return False

    async def judge(self, sample: Sample, *, rm_type: str | None = None) -> Verdict:
        """Return the parity of the sample's number, so that no group is one-sided."""
        if self._seconds:
            await asyncio.sleep(self._seconds)
        return Verdict(float(sample.index % 2))

    async def judge_group(self, samples: Sequence[Sample]) -> None:
        raise AssertionError("by_group is False")

    def close(self) -> None:
        """Do nothing: there are no workers."""


class NoTokenizer:
    """A tokenizer of which nothing is used but its size."""

    def __len__(self) -> int:
        return 0


class NoText(TokenText):
    """Tokens that have no text."""

    def __init__(self) -> None:
        """Do without a tokenizer."""

    @property
    def is_byte_level(self) -> bool:
        return True

    def decode(self, tokens: Sequence[int] | Array, *, skip_special_tokens: bool) -> str:
        return ""

    def continued(self, text: str, before: Array, tokens: Array, *, skip_special_tokens: bool) -> str:
        return ""


class SimulatedContext(RolloutContext):
    """A context without a tokenizer: responses have no text, and one token ends them."""

    @cached_property
    def end_token_ids(self) -> frozenset[int]:
        return frozenset([END])

    @cached_property
    def token_text(self) -> TokenText:
        return NoText()


class Rollouts:
    """The rollouts of one simulated run."""

    def __init__(self, args: Args, engines: TimedEngines, grain: int, *, reward_seconds: float) -> None:
        """`args` are those of `simulated_args`."""
        nothing: Any = NoTokenizer()
        self._args = args
        self._engines = engines
        self._source = DataBuffer(args, nothing, data=simulated_prompts())
        self.context = SimulatedContext(args, engines, nothing, SimulatedRewards(reward_seconds))

    async def make(self, rollout_id: int) -> RolloutResult:
        """Make one rollout.

        Raises:
            UsageError: the filter drops so much that the rollout gives up.
        """
        try:
            begin = asyncio.get_running_loop().time()
            result = await generate_rollout(self._args, rollout_id, self._source, self.context)
            result.metrics["time/rollout"] = asyncio.get_running_loop().time() - begin
            return result
        except RuntimeError as error:
            raise UsageError([_given_up(self._args, error)]) from error

    def lengths(self, result: RolloutResult) -> list[int]:
        """Return the tokens of prompt and response of each sample."""
        return [
            self._engines.sequence_tokens(int(sample.tokens_T[0]) - FIRST_PROMPT, sample.response_length)
            for group in result.groups
            for sample in group
        ]


def _given_up(args: Args, error: RuntimeError) -> Problem:
    return Problem(
        severity="error",
        where="--simulate-drop-rate",
        value=f"{args.simulate_drop_rate or 0:g}",
        rule=f"the simulated run ends: {error}",
        remedy="lower it",
    )


def refuse_other_runs(args: Args) -> None:
    """Check that the run's rollouts are the built-in ones. Raises UsageError with the flag that replaces them."""
    own = {
        "rollout_function_path": args.rollout_function_path != HookOptions.rollout_function_path,
        "data_source_path": args.has_own_data_source,
        "load_debug_rollout_data": args.load_debug_rollout_data is not None,
        "debug_train_only": args.debug_train_only,
        "debug_rollout_only": args.debug_rollout_only,
    }
    for name, is_own in own.items():
        if is_own:
            supervised = args.rollout_function_path == SFT_ROLLOUT
            rule = (
                "SFT generates nothing" if supervised else "--simulate knows only slime's own rollouts and a whole loop"
            )
            flag = f"--{name.replace('_', '-')}"
            value = vars(args)[name]
            shown = value if isinstance(value, str) else ""
            raise UsageError(
                [Problem(severity="error", where=flag, value=shown, rule=rule, remedy="leave one of the two out")]
            )
