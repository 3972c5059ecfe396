"""Generate one sample: send its prompt tokens to an engine and append the response tokens, in one or several parts.

- Called by: `group` and `evaluate` call `generate_sample` (or the function of --custom-generate-function-path) for
  many samples at a time. A sample that was aborted or cut off is passed in again.
- Invariant: the response is kept as the tokens that the engine sampled, each with the log-prob and the policy version
  of its part. The text is decoded from the tokens for the reward, and is never tokenized again.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from slime.config.args import SFT_ROLLOUT, Args
from slime.config.context import rollout_limits
from slime.config.sampling_record import OFF, SamplingRecord
from slime.core.columns import Array, routes_dtype
from slime.core.plugins import hook_failed, load_hook
from slime.core.sample import Sample, Status
from slime.engine.client import EngineError
from slime.engine.protocol import GenerateRequest, GenerateResponse, SamplingParams
from slime.rollout.endings import cut_at_stop_across_parts, has_ended
from slime.rollout.token_text import response_text

if TYPE_CHECKING:
    from slime.rollout.context import RolloutContext

Generate = Callable[[Args, Sample, SamplingParams, "RolloutContext"], Awaitable[Sample]]

LONG = 2048
"""Tokens of a response from which a tokenizer that decodes slowly does so in a thread."""
STATUS_BY_FINISH = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}


def rollout_sampling_params(args: Args) -> SamplingParams:
    """Return how training responses are sampled; each sample gets its own seed later."""
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
    """Return the record of this run's sampling that is stored with a dump."""
    if args.rollout_function_path == SFT_ROLLOUT:
        return SamplingRecord.of(args, None)
    params = rollout_sampling_params(args)
    return SamplingRecord.of(args, {name: float(vars(params)[name]) for name in ("temperature", *OFF)})


def sampling_seed(*parts: object) -> int:
    """Return a seed in [0, 2^31) that depends on every part, the same on every machine."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 2**31


def load_generate(args: Args) -> Generate:
    """Return `generate_sample`, or the user's function; a user's function that is not async runs in a thread.

    What the user's function raises becomes a HookFailed: also SystemExit, or a cancellation that nobody here asked for.
    An EngineError stays one, even if the function has raised another error because of it.
    """
    path = args.custom_generate_function_path
    if path is None:
        return generate_sample
    function = load_hook("custom_generate_function_path", path)

    async def generate(args: Args, sample: Sample, params: SamplingParams, context: RolloutContext) -> Sample:
        group_index, index = sample.group_index, sample.index  # a new Sample would lose them
        try:
            if inspect.iscoroutinefunction(function):
                result = await function(args, sample, params, context)
            else:
                result = await asyncio.to_thread(_without_stop_iteration, function, args, sample, params, context)
            if not isinstance(result, Sample):
                raise TypeError(f"it returned a {type(result).__name__}; it has to return the Sample")
            result.group_index, result.index = group_index, index
            result.check()
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            lost = engine_error_in(error)
            if lost is not None:
                raise lost from None
            raise hook_failed("custom_generate_function_path", path, error) from error
        return result

    return generate


def _without_stop_iteration(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function; no future can hold a StopIteration, so whoever waits for the thread would wait for ever."""
    try:
        return function(*arguments)
    except StopIteration as error:
        raise RuntimeError("the function raised StopIteration") from error


def engine_error_in(error: BaseException) -> EngineError | None:
    """Return the EngineError that is the error, is one of its group, or led to it; None if there is none."""
    seen: set[int] = set()
    todo = [error]
    while todo:
        one = todo.pop()
        if isinstance(one, EngineError):
            return one
        if id(one) in seen:
            continue
        seen.add(id(one))
        todo += [cause for cause in (one.__cause__, one.__context__) if cause is not None]
        todo += one.exceptions if isinstance(one, BaseExceptionGroup) else ()
    return None


async def generate_sample(
    args: Args, sample: Sample, sampling_params: SamplingParams, context: RolloutContext
) -> Sample:
    """Generate the response to `sample.tokens` in place, or continue the response that the sample has.

    `max_new_tokens` limits what is sampled, including the sampled tokens that are there already. If that limit or the
    context leaves no room, the sample becomes TRUNCATED as it is. A request that is aborted keeps its tokens, and the
    sample becomes ABORTED. A response whose newest token ends it is COMPLETED, whatever reason the engine gave.

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
        input_ids=sample.tokens_T.tolist(), sampling_params=params, return_routed_experts=args.use_routing_replay
    )
    response = await context.engines.generate(asked)
    if sample.response_length and params.stop_strings:
        response = cut_at_stop_across_parts(sample, response, params.stop_strings, context)
    text = None
    if not context.token_text.is_byte_level and sample.response_length + len(response.tokens_R) > LONG:
        text = await asyncio.to_thread(_text_with, args, sample, response, context)
    append_response(args, sample, response, context, params, text)
    return sample


def _text_with(args: Args, sample: Sample, response: GenerateResponse, context: RolloutContext) -> str:
    """Return the text of the whole response, with the engine's answer appended."""
    tokens_R = np.append(sample.response_tokens_R, response.tokens_R)
    skips = args.rollout_skip_special_tokens
    return response_text(sample, context.token_text, tokens_R, skip_special_tokens=skips)


def room(args: Args, sample: Sample, max_response_length: int) -> int:
    """Return how many tokens the response length and the engine's context still allow; 0 or less means none.

    Tokens of an environment count for the context alone.
    """
    limits = rollout_limits(args)
    left = max_response_length - sample.num_sampled
    if limits.request is not None and sample.num_tokens > limits.request:
        return min(left, 0)
    return left if limits.sequence is None else min(left, limits.sequence - sample.num_tokens)


def append_response(
    args: Args,
    sample: Sample,
    response: GenerateResponse,
    context: RolloutContext,
    params: SamplingParams,
    text: str | None = None,
) -> None:
    """Append the engine's answer to a request with `params`: tokens, each with its log-prob and policy version.

    `text` is that of the whole response, with this answer; None decodes it here.
    """
    text = _text_with(args, sample, response, context) if text is None else text
    begun, new_R = sample.response_length > 0, response.tokens_R
    # SGLang reports the version "default" before the first weight sync; that is version 0.
    version = int(response.weight_version) if response.weight_version.isdecimal() else 0
    mask_R = sample.array("loss_mask")
    sample.set_arrays(
        tokens=np.append(sample.tokens_T, new_R),
        rollout_log_probs=_appended(sample.array("rollout_log_probs"), response.log_probs_R, begun),
        policy_versions=_appended(sample.array("policy_versions"), np.full(len(new_R), version, dtype=np.int32), begun),
        loss_mask=None if mask_R is None else np.append(mask_R, np.ones(len(new_R), dtype=np.int8)),
    )
    sample.response_length += len(new_R)
    sample.set_text(text)
    if args.use_routing_replay:
        _take_routes(args, sample, response)
    ended = len(new_R) > 0 and has_ended(sample, params, context)
    sample.status = Status.COMPLETED if ended else STATUS_BY_FINISH[response.finish_reason]
    sample.check()


def _take_routes(args: Args, sample: Sample, response: GenerateResponse) -> None:
    """Store the routed experts of all tokens, also of earlier parts, which the engine prefilled with these weights.

    Raises:
        ValueError: a finished response has no experts, or not as many as this model's.
    """
    arch, experts = args.resolved.architecture, response.routed_experts
    if experts is None:
        if response.finish_reason == "abort":
            return  # aborted before the engine ran it
        raise ValueError(
            "--use-routing-replay: an engine does not report the experts of each token; start it with "
            "--enable-return-routed-experts, or leave the flag out"
        )
    # The response may have been cut at a stop text; the experts are cut at the same token.
    rows = response.prompt_tokens + response.completion_tokens - 1
    if experts.size != rows * arch.num_layers * arch.moe_router_topk:
        raise ValueError(
            f"--use-routing-replay: an engine returned {experts.size} experts for {rows} tokens, and in each of "
            f"{arch.num_layers} layers a token has {arch.moe_router_topk}; it serves another model"
        )
    routes = experts.reshape(rows, arch.num_layers, arch.moe_router_topk)
    routes = routes[: sample.num_tokens - 1, arch.first_dense_layers :]
    most, num_experts = int(routes.max(initial=0)), arch.num_experts or 0
    if most >= num_experts or routes.min(initial=0) < 0:
        raise ValueError(
            f"--use-routing-replay: an engine returned expert {most} of {num_experts}; it serves another model"
        )
    sample.routed_experts = routes.astype(routes_dtype(num_experts))  # a quarter or half of the engine's int32


def _appended(values_R: Array | None, more_R: Array, begun: bool) -> Array | None:
    """Return both after each other; if an earlier part of the response came without values, they stay missing."""
    if values_R is None or not begun:
        return None if begun else more_R
    return np.append(values_R, more_R)
