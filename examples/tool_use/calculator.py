r"""A model that uses a calculator: several turns in one sample, and no loss on what the tool wrote.

    --custom-generate-function-path examples.tool_use.calculator.generate
    --custom-convert-samples-to-train-data-path examples.tool_use.calculator.without_outputs      (supervised start)

The model writes `calc(47*8)`; the engine stops there; the tool's `=376;` is appended, and the model goes on:

    <think>calc(47*8)=376;calc(376+35)=411;</think>\boxed{411}
                     ~~~~~            ~~~~~                      from the tool: loss_mask 0

What a generate function of several turns has to keep to:

1. Tokens stay as they were sampled; the tool's text alone is tokenised. `generate_sample` appends what the engine
   answers, and counts what is there against the limit of the response.
2. Every response token has an entry in every per-token field. One that no policy has sampled has loss_mask 0, which
   keeps it out of the loss, of importance weights and of every metric of tokens; its log-prob is 0 and its policy
   version that of the token before it, so that the fields stay whole.
3. Between two turns the state is the sample alone. An aborted one is returned as it is (Status.ABORTED), and may come
   back later with its tokens: the function looks at them first, and goes on.
4. What the model writes is parsed, never run: no `eval`.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from itertools import chain

from slime.config.args import Args
from slime.core.batch import TrainBatch, from_samples
from slime.core.sample import Sample, Status
from slime.engine.protocol import SamplingParams
from slime.rollout.context import RolloutContext
from slime.rollout.generate import generate_sample, room
from slime.rollout.tokenizer import tokenize

CALL = re.compile(r"calc\(([^()]*)\)")
CALL_END = ")"
EXPRESSION = re.compile(r"\d{1,9}(?:[-+*]\d{1,9}){0,3}")
OUTPUT = re.compile(r"(?<=\))=-?[\d?]*;")
"""What the tool has appended, in a text."""


def calculate(expression: str) -> int | None:
    """The value of up to four numbers joined by + - *, products first; None where it is no such thing."""
    if not EXPRESSION.fullmatch(expression):
        return None
    total = 0
    for term in re.findall(r"[-+]?[\d*]+", expression):
        product = -1 if term.startswith("-") else 1
        for factor in term.lstrip("+-").split("*"):
            product *= int(factor)
        total += product
    return total


def output_of(text: str) -> str | None:
    """What the tool answers to a text that ends in a call; None where it ends in none."""
    calls = list(CALL.finditer(text))
    if not calls or calls[-1].end() != len(text):
        return None
    value = calculate(calls[-1][1])
    return "=?;" if value is None else f"={value};"


async def generate(args: Args, sample: Sample, sampling_params: SamplingParams, context: RolloutContext) -> Sample:
    """Turns of the model and of the tool, until the model is done, or has no room left, or is aborted."""
    until_call = replace(sampling_params, stop=(*sampling_params.stop_strings, CALL_END))
    if sample.loss_mask is None:
        sample.loss_mask = [1] * sample.response_length
    while True:
        output = output_of(sample.response)
        if output is not None:
            [tokens] = tokenize(context.tokenizer, [output], add_special_tokens=False)
            if room(args, sample, sys.maxsize) <= len(tokens):  # the response's limit is the model's, not the tool's
                sample.status = Status.TRUNCATED
                return sample
            append_unsampled(sample, tokens)
        sample = await generate_sample(args, sample, until_call, context)
        if sample.status is not Status.COMPLETED or not sample.response.endswith(CALL_END):
            return sample


def append_unsampled(sample: Sample, tokens: list[int]) -> None:
    """Response tokens that the model did not write."""
    assert sample.rollout_log_probs and sample.policy_versions and sample.loss_mask, "a call comes first"
    sample.tokens = [*sample.tokens, *tokens]
    sample.response_length += len(tokens)
    sample.loss_mask = [*sample.loss_mask, *[0] * len(tokens)]
    sample.rollout_log_probs = [*sample.rollout_log_probs, *[0.0] * len(tokens)]
    sample.policy_versions = [*sample.policy_versions, *[sample.policy_versions[-1]] * len(tokens)]


def without_outputs(args: Args, samples: list[Sample]) -> TrainBatch:
    """Demonstrations that hold the tool's outputs: the model is to read them, not to write them.

    With one token a character, as this example's tokenizer has it up to `</think>`, places in the text are places in
    the tokens.
    """
    for sample in samples:
        outputs = chain.from_iterable(range(*match.span()) for match in OUTPUT.finditer(sample.response))
        sample.loss_mask = [1] * sample.response_length
        for place in outputs:
            sample.loss_mask[place] = 0
    return from_samples(samples, args.reward_key)
