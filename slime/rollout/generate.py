"""One sample: prompt tokens to the engine, response tokens back.

Path: `collect` and `evaluate` call `generate_sample` (or the function of --custom-generate-function-path) once a
sample, many at a time. Invariant: what the engine produced is kept token by token; text is made from tokens for the
reward, and never tokenised again.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from slime.config.args import Args
from slime.core.plugins import load_hook
from slime.core.sample import Sample, Status
from slime.engine.protocol import GenerateRequest, GenerateResponse, SamplingParams
from slime.rollout.prompts import context_length

if TYPE_CHECKING:
    from slime.rollout.context import RolloutContext

Generate = Callable[[Args, Sample, SamplingParams, "RolloutContext"], Awaitable[Sample]]

STATUS_BY_FINISH = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}


def rollout_sampling_params(args: Args) -> SamplingParams:
    """How training responses are sampled; the seed is each sample's own."""
    return SamplingParams(
        temperature=args.rollout_temperature,
        top_p=args.rollout_top_p,
        top_k=args.rollout_top_k or -1,
        max_new_tokens=args.rollout_max_response_len,
        stop=args.rollout_stop or None,
        stop_token_ids=args.rollout_stop_token_ids or None,
        skip_special_tokens=args.rollout_skip_special_tokens,
        no_stop_trim=True,
    )


def sampling_seed(*parts: object) -> int:
    """A seed in [0, 2^31) that depends on every part, the same on every machine."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 2**31


def load_generate(args: Args) -> Generate:
    """`generate_sample`, or the user's function (a plain one runs in a thread)."""
    if args.custom_generate_function_path is None:
        return generate_sample
    function = load_hook("custom_generate_function_path", args.custom_generate_function_path)

    async def generate(args: Args, sample: Sample, params: SamplingParams, context: RolloutContext) -> Sample:
        group_index, index = sample.group_index, sample.index  # a new Sample would lose them
        if inspect.iscoroutinefunction(function):
            result = await function(args, sample, params, context)
        else:
            result = await asyncio.to_thread(function, args, sample, params, context)
        if not isinstance(result, Sample):
            raise ValueError(
                f"--custom-generate-function-path {args.custom_generate_function_path}: it returned a "
                f"{type(result).__name__}; it has to return the Sample"
            )
        result.group_index, result.index = group_index, index
        result.check()
        return result

    return generate


async def generate_sample(
    args: Args, sample: Sample, sampling_params: SamplingParams, context: RolloutContext
) -> Sample:
    """Generate the response to `sample.tokens`, in place.

    Raises:
        EngineError: the engines did not answer, after retries.
    """
    limit = context_length(args)
    room = sampling_params.max_new_tokens if limit is None else limit - len(sample.tokens)
    params = replace(sampling_params, max_new_tokens=min(sampling_params.max_new_tokens, room))
    response = await context.engines.generate(GenerateRequest(input_ids=sample.tokens, sampling_params=params))
    fill_response(args, sample, response, context)
    return sample


def fill_response(args: Args, sample: Sample, response: GenerateResponse, context: RolloutContext) -> None:
    """Write what the engine answered into the sample."""
    tokens = response.output_ids
    sample.tokens = sample.prompt_tokens + tokens
    sample.response_length = len(tokens)
    sample.response = context.decode(tokens, skip_special_tokens=args.rollout_skip_special_tokens)
    sample.rollout_log_probs = response.log_probs
    # An engine calls weights that nothing was sent to "default" (SGLang): that is version 0.
    version = int(response.weight_version) if response.weight_version.isdecimal() else 0
    sample.policy_versions = [version] * len(tokens)
    sample.status = STATUS_BY_FINISH[response.finish_reason]
    sample.check()
