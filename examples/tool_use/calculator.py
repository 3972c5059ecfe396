r"""A model that uses a calculator: several turns in one sample, and no loss on the tool's output.

    --custom-generate-function-path examples.tool_use.calculator.generate
    --custom-convert-samples-to-train-data-path examples.tool_use.calculator.without_outputs      (supervised start)

The model writes `calc(47*8)` and the engine stops there. The tool's `=376;` is appended, and the model continues:

    <think>calc(47*8)=376;calc(376+35)=411;</think>\boxed{411}
                     ~~~~~            ~~~~~                      from the tool: loss_mask 0

The rules for a generate function with several turns:

1. Sampled tokens stay as they are; only the tool's text is tokenized. `generate_sample` appends the engine's answer and
   counts the sampled tokens that are already there against the limit of the response.
2. What the model did not write is appended with `append_environment`, or `append_messages` for messages. It has
   loss_mask 0, and does not count against the limit of the response, only against the context.
3. Between two turns, the sample is the only state. An aborted sample is returned as it is (Status.ABORTED) and may come
   back later with its tokens: the function looks at them first, and continues from there.
4. The model's text is parsed, never executed: no `eval`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import chain

from slime.config.args import Args
from slime.core.batch import TrainBatch, from_samples
from slime.core.sample import Sample, Status
from slime.engine.protocol import SamplingParams
from slime.rollout.context import RolloutContext
from slime.rollout.generate import generate_sample
from slime.rollout.multi_turn import append_environment

CALL = re.compile(r"calc\(([^()]*)\)")
CALL_END = ")"
EXPRESSION = re.compile(r"\d{1,9}(?:[-+*]\d{1,9}){0,3}")
OUTPUT = re.compile(r"(?<=\))=-?[\d?]*;")
"""Matches the tool's outputs in a text."""


def calculate(expression: str) -> int | None:
    """Return the value of up to four numbers joined by + - *, products first; None for anything else."""
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
    """Return the tool's answer to a text that ends in a call; None if it does not end in a call."""
    calls = list(CALL.finditer(text))
    if not calls or calls[-1].end() != len(text):
        return None
    value = calculate(calls[-1][1])
    return "=?;" if value is None else f"={value};"


async def generate(args: Args, sample: Sample, sampling_params: SamplingParams, context: RolloutContext) -> Sample:
    """Alternate turns of the model and the tool, until the model finishes, has no room left, or is aborted."""
    until_call = replace(sampling_params, stop=(*sampling_params.stop_strings, CALL_END))
    while True:
        output = output_of(sample.response)
        if output is not None and not append_environment(sample, output, context):
            return sample
        sample = await generate_sample(args, sample, until_call, context)
        if sample.status is not Status.COMPLETED or not sample.response.endswith(CALL_END):
            return sample


def without_outputs(args: Args, samples: list[Sample]) -> TrainBatch:
    """Mask the tool's outputs in demonstrations: the model should read them, not learn to write them.

    This example's tokenizer has one token for each character up to `</think>`, so positions in the text are positions
    in the tokens.
    """
    for sample in samples:
        outputs = chain.from_iterable(range(*match.span()) for match in OUTPUT.finditer(sample.response))
        sample.loss_mask = [1] * sample.response_length
        for place in outputs:
            sample.loss_mask[place] = 0
    return from_samples(samples, args.reward_key)
