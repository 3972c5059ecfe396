"""One sample: prompt tokens to the engine, response tokens back, in as many parts as it takes.

Path: `group_run` and `evaluate` call `generate_sample` (or the function of --custom-generate-function-path) for each
sample, many at a time; a sample that was aborted or cut off comes again. Invariant: what the engine produced is kept
token by token, with the log-prob and the policy version of the part that made it; text is made from tokens for the
reward, and never tokenised again.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from slime.config.args import Args
from slime.config.context import rollout_limits
from slime.config.sampling_record import OFF, SamplingRecord
from slime.core.plugins import load_hook
from slime.core.sample import Sample, Status
from slime.engine.protocol import GenerateRequest, GenerateResponse, SamplingParams
from slime.rollout.endings import cut_at_stop_across_parts, has_ended

if TYPE_CHECKING:
    from slime.rollout.context import RolloutContext

T = TypeVar("T")

Generate = Callable[[Args, Sample, SamplingParams, "RolloutContext"], Awaitable[Sample]]

SFT_ROLLOUT = "slime.rollout.sft_rollout.generate_rollout"
"""The rollout function that takes the data's responses."""

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


def sampling_record(args: Args) -> SamplingRecord:
    """What a dump says of how this run samples."""
    if args.rollout_function_path == SFT_ROLLOUT:
        return SamplingRecord.of(args, None)
    params = rollout_sampling_params(args)
    return SamplingRecord.of(args, {name: float(vars(params)[name]) for name in ("temperature", *OFF)})


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
    """Generate the response to `sample.tokens`, in place, or go on with the response that it has.

    `max_new_tokens` is of the whole response, what there is of it included. Where nothing is left of that, or of the
    context, the sample is truncated as it is. A request that is aborted leaves what it made: ABORTED. A response whose
    newest token ends it is COMPLETED, whatever reason the engine gave.

    Raises:
        EngineError: the engines did not answer, after retries; the sample is as it was.
    """
    going_on = sample.status in (Status.ABORTED, Status.TRUNCATED)
    if going_on and has_ended(sample, sampling_params, context):
        sample.status = Status.COMPLETED
        return sample
    left = room(args, sample, sampling_params.max_new_tokens)
    if left <= 0:
        sample.status = Status.TRUNCATED
        return sample
    params = replace(sampling_params, max_new_tokens=left)
    asked = GenerateRequest(
        input_ids=sample.tokens, sampling_params=params, return_routed_experts=args.use_routing_replay
    )
    response = await context.engines.generate(asked)
    if sample.response_length and params.stop_strings:
        response = cut_at_stop_across_parts(sample, response, params.stop_strings, context)
    append_response(args, sample, response, context, params)
    return sample


def room(args: Args, sample: Sample, max_response_length: int) -> int:
    """Tokens that may still come, by the length of the response and by what an engine takes; 0 or less: none."""
    limits = rollout_limits(args)
    left = max_response_length - sample.response_length
    if limits.request is not None and len(sample.tokens) > limits.request:
        return min(left, 0)
    return left if limits.sequence is None else min(left, limits.sequence - len(sample.tokens))


def append_response(
    args: Args, sample: Sample, response: GenerateResponse, context: RolloutContext, params: SamplingParams
) -> None:
    """Append what the engine answered to a request with `params`: tokens, each with its log-prob and its version."""
    begun = sample.response_length > 0
    tokens = response.output_ids
    # An engine calls weights that nothing was sent to "default" (SGLang): that is version 0.
    version = int(response.weight_version) if response.weight_version.isdecimal() else 0
    sample.tokens = sample.tokens + tokens
    sample.response_length += len(tokens)
    sample.rollout_log_probs = _behind(sample.rollout_log_probs, response.log_probs, begun)
    sample.policy_versions = _behind(sample.policy_versions, [version] * len(tokens), begun)
    if sample.loss_mask is not None:
        sample.loss_mask = sample.loss_mask + [1] * len(tokens)
    if args.use_routing_replay:
        _take_routes(args, sample, response)
    text = context.decode(sample.tokens[sample.prompt_length :], skip_special_tokens=args.rollout_skip_special_tokens)
    sample.response = text
    ended = bool(tokens) and has_ended(sample, params, context)
    sample.status = Status.COMPLETED if ended else STATUS_BY_FINISH[response.finish_reason]
    sample.check()


def _take_routes(args: Args, sample: Sample, response: GenerateResponse) -> None:
    """To which experts all tokens went, earlier parts' too: the engine has run them anew, with the weights of this one.

    Raises:
        ValueError: the engine does not say it, though it has finished, or in another shape than the model's.
    """
    shape, experts = args.architecture, response.routed_experts
    assert shape is not None, "a real run has one"
    if experts is None:
        if response.finish_reason == "abort":
            return  # before it was run
        raise ValueError(
            "--use-routing-replay: an engine does not say to which experts tokens went; start it with "
            "--enable-return-routed-experts, or leave the flag out"
        )
    # What a stop text has cut off the response is cut off here, too.
    rows = response.prompt_tokens + response.completion_tokens - 1
    if experts.size != rows * shape.num_layers * shape.moe_router_topk:
        raise ValueError(
            f"--use-routing-replay: an engine names {experts.size} experts, and {rows} tokens in {shape.num_layers} "
            f"layers have {shape.moe_router_topk} each; it serves another model"
        )
    routes = experts.reshape(rows, shape.num_layers, shape.moe_router_topk)
    sample.routed_experts = np.ascontiguousarray(routes[: len(sample.tokens) - 1, shape.first_dense_layers :])


def _behind(values: list[T] | None, more: list[T], begun: bool) -> list[T] | None:
    """`more` behind `values`; where a response has begun without them, they stay missing."""
    return None if begun and values is None else [*(values or []), *more]
