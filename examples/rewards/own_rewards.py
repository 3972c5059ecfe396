r"""Your own rewards: a plain function of one sample, an async judge of one sample, and a function of a whole group.

    --custom-rm-path examples.rewards.own_rewards.short_and_right
    --custom-rm-path examples.rewards.own_rewards.ask_judge             (JUDGE_URL=http://HOST:PORT/v1/chat/completions)
    --custom-rm-path examples.rewards.own_rewards.shortest_right --group-rm

The rules for reward functions:

1. They run in worker processes (--rm-num-workers) that load this module and nothing else of the run. They get copies:
   changes to a sample are lost. Module variables live as long as the worker.
2. One call may take --rm-timeout seconds. A call that raises, hangs, dies or returns no number costs its own sample (or
   its group) and is counted under rollout/reward_failed. Return a number only if you have judged.
3. With `async def`, a worker runs up to --rm-concurrency calls at the same time. They must not block: time.sleep or a
   long computation stops the other calls too, and beyond --rm-timeout it ends the worker.
4. A plain function judges one sample (or one group) at a time in each worker, and may compute as long as it likes.
"""

from __future__ import annotations

import os
import re

import aiohttp

from slime.config.args import Args
from slime.core.sample import Sample
from slime.rollout.rewards.deepscaler import deepscaler

QUESTION = (
    "Question: {prompt}\n\nAnswer: {response}\n\nHow good is the answer, from 0 to 10? Reply with the number alone."
)


def short_and_right(args: Args, sample: Sample) -> float:
    """Return 1 if a response of at most 500 tokens contains the label, else 0."""
    return float(sample.label is not None and sample.label in sample.response and sample.response_length <= 500)


async def ask_judge(args: Args, sample: Sample) -> float:
    """Return the score, from 0 to 1, that a language model with an OpenAI-style API gives the response."""
    text = QUESTION.format(prompt=sample.prompt, response=sample.response)
    body = {"model": "judge", "temperature": 0, "messages": [{"role": "user", "content": text}]}
    url = os.environ["JUDGE_URL"]
    async with aiohttp.ClientSession(raise_for_status=True) as session, session.post(url, json=body) as answer:
        reply = (await answer.json())["choices"][0]["message"]["content"]
    number = re.fullmatch(r"\s*(10|\d)\s*", reply)
    if number is None:
        raise ValueError(f"the judge replied {reply[:80]!r}, which is not a number from 0 to 10")
    return int(number[1]) / 10


def shortest_right(args: Args, samples: list[Sample], **kwargs: object) -> list[float]:
    """Return 1 for the shortest right response to a prompt, 1/2 for one of twice its length, 0 for wrong ones."""
    right = [deepscaler(sample.response, sample.label or "") == 1 for sample in samples]
    shortest = min((s.response_length for s, is_right in zip(samples, right, strict=True) if is_right), default=0)
    return [
        shortest / sample.response_length if is_right else 0.0 for sample, is_right in zip(samples, right, strict=True)
    ]
