r"""Rewards of your own: a plain function of one sample, an async judge of one, and a function of a whole group.

    --custom-rm-path examples.rewards.own_rewards.short_and_right
    --custom-rm-path examples.rewards.own_rewards.ask_judge             (JUDGE_URL=http://HOST:PORT/v1/chat/completions)
    --custom-rm-path examples.rewards.own_rewards.shortest_right --group-rm

What all may rely on, and what they have to keep to:

1. They run in worker processes (--rm-num-workers) that load this module and nothing else of the run, and get copies:
   what they write into a sample is lost. Module variables live as long as the worker.
2. One call has --rm-timeout seconds. What raises, hangs, dies or returns no number costs its own sample (its group),
   and is counted under rollout/reward_failed; return a number only where you have judged.
3. `async def` lets --rm-concurrency calls wait beside each other. Nothing in it may block: time.sleep or a long
   computation stops the others for as long, and beyond --rm-timeout ends the worker.
4. A plain function judges one sample (one group) at a time in each worker, and may compute as long as it likes.
"""

from __future__ import annotations

import os
import re

import aiohttp

from slime.config.args import Args
from slime.core.sample import Sample
from slime.rollout.rm_hub.deepscaler import deepscaler

QUESTION = (
    "Question: {prompt}\n\nAnswer: {response}\n\nHow good is the answer, from 0 to 10? Reply with the number alone."
)


def short_and_right(args: Args, sample: Sample) -> float:
    """1 where the label stands in a response of at most 500 tokens, else 0."""
    return float(sample.label is not None and sample.label in sample.response and sample.response_length <= 500)


async def ask_judge(args: Args, sample: Sample) -> float:
    """What a language model behind an OpenAI-style API says of the response, from 0 to 1."""
    text = QUESTION.format(prompt=sample.prompt, response=sample.response)
    body = {"model": "judge", "temperature": 0, "messages": [{"role": "user", "content": text}]}
    url = os.environ["JUDGE_URL"]
    async with aiohttp.ClientSession(raise_for_status=True) as session, session.post(url, json=body) as answer:
        reply = (await answer.json())["choices"][0]["message"]["content"]
    number = re.fullmatch(r"\s*(10|\d)\s*", reply)
    if number is None:
        raise ValueError(f"the judge replied {reply[:80]!r}, which is no number from 0 to 10")
    return int(number[1]) / 10


def shortest_right(args: Args, samples: list[Sample], **kwargs: object) -> list[float]:
    """1 for the shortest right response to a prompt, 1/2 for one of twice its length, 0 for wrong ones."""
    right = [deepscaler(sample.response, sample.label or "") == 1 for sample in samples]
    shortest = min((s.response_length for s, is_right in zip(samples, right, strict=True) if is_right), default=0)
    return [
        shortest / sample.response_length if is_right else 0.0 for sample, is_right in zip(samples, right, strict=True)
    ]
