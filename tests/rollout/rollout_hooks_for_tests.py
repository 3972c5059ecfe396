"""A function for each hook of the rollout, with exactly the declared parameters, which checks its arguments."""

from __future__ import annotations

from slime.config.args import Args
from slime.core.sample import Sample, Status
from slime.engine.client import EngineError
from slime.engine.protocol import SamplingParams
from slime.rollout.context import RolloutContext
from slime.rollout.data_buffer import DataBuffer
from slime.rollout.generate import generate_sample

CALLS: list[tuple[str, object]] = []
"""The hook and what it was called for, in this process (the reward runs in another)."""


async def generate(args: Args, sample: Sample, sampling_params: SamplingParams, context: RolloutContext) -> Sample:
    assert isinstance(args, Args)
    assert isinstance(sampling_params, SamplingParams)
    assert isinstance(context, RolloutContext)
    assert (sample.status, sample.response_length) == (Status.PENDING, 0)
    CALLS.append(("generate", sample.index))
    return await generate_sample(args, sample, sampling_params, context)


async def generate_or_fail(
    args: Args, sample: Sample, sampling_params: SamplingParams, context: RolloutContext
) -> Sample:
    if sample.label == "fails":
        raise EngineError("http://nowhere", 500, "as the label says")
    return await generate_sample(args, sample, sampling_params, context)


REMEMBERED: list[tuple[SamplingParams, Sample]] = []


async def generate_and_remember(
    args: Args, sample: Sample, sampling_params: SamplingParams, context: RolloutContext
) -> Sample:
    result = await generate_sample(args, sample, sampling_params, context)
    REMEMBERED.append((sampling_params, result))
    return result


async def number(args: Args, sample: Sample, sampling_params: SamplingParams, context: RolloutContext) -> Sample:
    """Make a response of one token, right if the sample's number is even; with the label "abort" none ever ends."""
    CALLS.append(("number", (sample.group_index, sample.index, sampling_params.sampling_seed)))
    if sample.label == "abort":
        sample.status = Status.ABORTED
        return sample
    sample.tokens, sample.response_length = [*sample.tokens, 9], 1
    sample.status, sample.reward = Status.COMPLETED, float(sample.index % 2 == 0)
    return sample


def reward(args: Args, sample: Sample) -> float:
    assert isinstance(args, Args)
    assert sample.status in (Status.COMPLETED, Status.TRUNCATED)
    return float(sample.index)


def dynamic_filter(args: Args, samples: list[Sample]) -> bool:
    assert isinstance(args, Args)
    assert [sample.reward for sample in samples] == [float(sample.index) for sample in samples]
    CALLS.append(("dynamic_filter", samples[0].group_index))
    return True


def buffer_filter(args: Args, rollout_id: int, buffer: list[list[Sample]], num_samples: int) -> list[list[Sample]]:
    assert isinstance(args, Args)
    assert isinstance(buffer[0][0], Sample)
    CALLS.append(("buffer_filter", (rollout_id, len(buffer), num_samples)))
    return [buffer.pop() for _ in range(min(num_samples, len(buffer)))]


def sample_filter(args: Args, samples: list[Sample]) -> None:
    assert isinstance(args, Args)
    for sample in samples:
        assert sample.loss_mask == [1] * sample.response_length
    CALLS.append(("sample_filter", len(samples)))


def post_process(args: Args, samples: list[Sample]) -> list[float]:
    assert isinstance(args, Args)
    CALLS.append(("post_process", len(samples)))
    return [-sample.reward_value() for sample in samples]


class NoPrompts:
    """A data source that --num-epoch cannot count, and that takes no groups back."""

    def __init__(self, args: Args, tokenizer: object) -> None: ...

    def get_groups(self, num: int, *, rollout_id: int) -> list[list[Sample]]:
        return []

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None: ...


class Declared(NoPrompts):
    """A data source whose `num_prompts` is set on the instance."""

    num_prompts: int

    def add_groups(self, groups: list[list[Sample]]) -> None: ...


class Inherited(DataBuffer):
    """A data source that only inherits."""
