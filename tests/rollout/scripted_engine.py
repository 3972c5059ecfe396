"""The rollout side's engine under a test's control: it answers when the test decides, and with as many tokens.

Its draws are a function of seed, position and policy version alone, as an engine's draws are. So a test can verify for
every token of a sample which request made it, and with which weights.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field

from slime.config.args import Args
from slime.core.sample import Sample
from slime.engine.protocol import FinishReason, GenerateRequest, GenerateResponse, SamplingParams
from slime.rollout.context import RolloutContext
from slime.rollout.generate import generate_sample, sampling_seed

END = 3
"""The token <|user|> of the tests' tokenizer."""


def draw(seed: int, position: int, version: int) -> tuple[int, float]:
    """Return a token, which ends the response in one of six cases, and its log-prob."""
    number = int.from_bytes(hashlib.blake2b(f"{seed}/{position}/{version}".encode(), digest_size=4).digest(), "big")
    return END if number % 6 == 0 else 20 + number % 50, -1 - number % 1000 / 1000


@dataclass
class InFlight:
    request: GenerateRequest
    answer: asyncio.Future[GenerateResponse]
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    def end(self, reason: FinishReason, version: int) -> None:
        response = GenerateResponse(
            output_ids=self.tokens,
            log_probs=self.log_probs,
            finish_reason=reason,
            weight_version=str(version),
            text="",
            prompt_tokens=len(self.request.input_ids or []),
            completion_tokens=len(self.tokens),
            input_log_probs=[],
        )
        self.answer.set_result(response)


class ScriptedEngine:
    """The part of an EngineClient that `collect` uses."""

    def __init__(self, version: int = 1) -> None:
        self.version = version
        self.in_flight: list[InFlight] = []
        self.num_requests = 0

    async def workers(self) -> list[str]:
        return ["http://scripted"]

    async def generate(self, request: GenerateRequest) -> GenerateResponse:
        asked = InFlight(request, asyncio.get_running_loop().create_future())
        self.in_flight.append(asked)
        self.num_requests += 1
        try:
            return await asked.answer
        finally:
            if asked in self.in_flight:
                self.in_flight.remove(asked)

    async def abort_all(self) -> None:
        for asked in self.in_flight:
            asked.end("abort", self.version)
        self.in_flight.clear()

    # ---- the test's side

    def advance(self, place: int, num_tokens: int) -> None:
        """Give `count` more tokens to one request; it is answered if they end it."""
        asked = self.in_flight[place]
        params = asked.request.sampling_params
        assert params.sampling_seed is not None
        for _ in range(num_tokens):
            position = len(asked.request.input_ids or []) + len(asked.tokens)
            token, log_prob = draw(params.sampling_seed, position, self.version)
            asked.tokens.append(token)
            asked.log_probs.append(log_prob)
            if token == END or len(asked.tokens) == params.max_new_tokens:
                # SGLang 0.5.16 looks at the length before it looks for stops.
                asked.end("length" if len(asked.tokens) == params.max_new_tokens else "stop", self.version)
                self.in_flight.remove(asked)
                return

    async def update_weights(self) -> None:
        """Answer what is in flight with its tokens, by the old weights, and change to the new weights."""
        await self.abort_all()
        self.version += 1


def reward_of(sample: Sample) -> float:
    return float(sum(sample.tokens[sample.prompt_length :]) % 2)


async def generate_and_judge(
    args: Args, sample: Sample, sampling_params: SamplingParams, context: RolloutContext
) -> Sample:
    """Run the built-in generation, and judge without worker processes."""
    assert not sample.is_finished
    assert sample.reward is None
    sample = await generate_sample(args, sample, sampling_params, context)
    whole = sample.response_length == args.rollout_max_response_len or sample.tokens[-1] == END
    if sample.is_finished and whole:  # otherwise it was set aside, and continues later
        sample.reward = reward_of(sample)
    return sample


def check_drawn(args: Args, sample: Sample) -> None:
    """Check that every token is the one that its version draws at its position, with the log-prob of that draw."""
    sample.check()
    assert sample.rollout_log_probs is not None
    assert sample.policy_versions is not None
    seed = sampling_seed(args.rollout_seed, sample.metadata["start_rollout_id"], sample.index)
    for place, version in enumerate(sample.policy_versions):
        position = sample.prompt_length + place
        expected = draw(seed, position, version)
        assert (sample.tokens[position], sample.rollout_log_probs[place]) == expected
    assert sample.policy_versions == sorted(sample.policy_versions)
    response = sample.tokens[sample.prompt_length :]
    assert END not in response[:-1]
    assert len(response) <= args.rollout_max_response_len
    if sample.is_finished:
        assert response[-1] == END or len(response) == args.rollout_max_response_len
