"""Hooks that fail, with an exception that cannot be unpickled, as those of openai's client."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from slime.config.args import Args
from slime.core.sample import Sample, Status
from slime.engine.client import EngineError
from slime.engine.protocol import SamplingParams
from slime.rollout.context import RolloutContext
from slime.rollout.generate import generate_sample


class NotFoundError(Exception):
    """An error whose pickle cannot be read, because its constructor requires a keyword argument."""

    def __init__(self, message: str, *, response: object) -> None:
        super().__init__(message)
        self.response = response


def fail(*arguments: Any) -> Any:
    raise NotFoundError("no such model: judge-7", response=404)


class Failing:
    """A data source whose constructor fails."""

    num_prompts: int

    def __init__(self, args: Args, tokenizer: object) -> None:
        fail(args, tokenizer)

    def get_groups(self) -> None: ...

    def add_groups(self) -> None: ...

    def state_dict(self) -> None: ...

    def load_state_dict(self) -> None: ...


def written(sample: Sample) -> Sample:
    """Return the sample with a response of one token and a reward, without an engine."""
    sample.tokens, sample.response_length = [*sample.tokens, 5], 1
    sample.rollout_log_probs, sample.policy_versions = [-1.0], [0]
    sample.reward, sample.status = float(sample.index % 4), Status.COMPLETED
    return sample


async def fail_on_odd(args: Args, sample: Sample, sampling_params: SamplingParams, context: RolloutContext) -> Sample:
    """Fail for samples of odd index, each time in another way, and spoil the sample before."""
    if sample.index % 2 == 0:
        return written(sample)
    sample.tokens = []
    match sample.index // 2 % 4:
        case 0:
            raise NotFoundError("no such tool", response=404)
        case 1:
            sys.exit("the tool has ended the process")
        case 2:
            await cancel_itself()
        case _:
            sample.loss_mask = [1] * 7
    return sample


async def cancel_itself() -> None:
    task = asyncio.create_task(asyncio.sleep(100))
    task.cancel()
    await task


def fail_plainly(args: Args, sample: Sample, sampling_params: SamplingParams, context: RolloutContext) -> Sample:
    """A plain function, in a thread, whose error no future can hold."""
    return next(iter([]))


async def return_nothing(args: Args, sample: Sample, sampling_params: SamplingParams, context: RolloutContext) -> None:
    return None


async def misreport_a_lost_engine(
    args: Args, sample: Sample, sampling_params: SamplingParams, context: RolloutContext
) -> Sample:
    """Raise errors of its own for an engine that does not answer."""
    try:
        raise EngineError("http://nowhere", 500, "it is gone")
    except EngineError as error:
        if sample.index % 2:
            raise KeyError("choices") from error
        raise ExceptionGroup("two calls", [ValueError("one"), error]) from None


CALLED_WITH: list[tuple[int, Status, int]] = []


async def require_a_whole_turn(
    args: Args, sample: Sample, sampling_params: SamplingParams, context: RolloutContext
) -> Sample:
    """Generate a turn, and parse it without a look at its status, so that one that was cut off raises an error."""
    CALLED_WITH.append((sample.index, sample.status, sample.response_length))
    sample = await generate_sample(args, sample, sampling_params, context)
    if sample.status is Status.ABORTED:
        raise IndexError("the turn has no end")
    sample.reward = 1.0
    return sample
