"""Tokens per second through slime (router, client, collect, rewards), and of the same requests sent directly to SGLang.

Both take turns in one run with one engine, so that only the way to the engine differs.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from slime.config.args import Args
from slime.core.batch import from_samples
from slime.engine.protocol import Endpoint, GenerateRequest
from slime.rollout import collect
from slime.rollout.context import DataSource, RolloutContext, RolloutResult
from slime.rollout.generate import rollout_sampling_params, sampling_seed
from tests.gpu.checks import Report, check
from tests.gpu.runs import PLAIN_ENGINE, kept_directory, run, scratch, train

PROMPTS, SAMPLES = 32, 8
PROMPT_TOKENS, NEW_TOKENS = 128, 512
ROUNDS = 6
"""The number of rollouts; the first one warms up and is not counted."""
SPEEDS = "speeds.jsonl"
SMALLEST_SHARE = 0.97
LETTERS = "abcdefghijklmnopqrstuvwxyz "


def made_up(rng: random.Random) -> str:
    """Return a prompt of PROMPT_TOKENS tokens: a random checkpoint's tokenizer has one token for each byte."""
    return "".join(rng.choices(LETTERS, k=PROMPT_TOKENS))


async def decodes_by_graphs(context: RolloutContext) -> bool:
    """Return whether the first engine replays CUDA graphs to generate tokens."""
    [url, *_] = await context.engines.workers()
    async with aiohttp.ClientSession(trust_env=False) as session, session.get(url + Endpoint.SERVER_INFO) as answer:
        answer.raise_for_status()
        info = orjson.loads(await answer.read())
    return not (info.get("disable_cuda_graph", True) or info.get("disable_decode_cuda_graph"))


async def straight(
    args: Args, context: RolloutContext, prompts: Sequence[list[int]], round_id: int
) -> tuple[int, float]:
    """Send one request for each prompt directly to the engines, all at once; return tokens and seconds."""
    params = rollout_sampling_params(args)
    bodies = [
        orjson.dumps(
            GenerateRequest(
                input_ids=prompt,
                sampling_params=replace(params, sampling_seed=sampling_seed("straight", round_id, index)),
            ).to_json()
        )
        for index, prompt in enumerate(prompts)
    ]
    urls = [url + Endpoint.GENERATE for url in await context.engines.workers()]
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(connector=connector, headers=headers, trust_env=False) as session:

        async def one(index: int, body: bytes) -> int:
            async with session.post(urls[index % len(urls)], data=body) as answer:
                answer.raise_for_status()
                return len(orjson.loads(await answer.read())["output_ids"])

        start = time.perf_counter()
        tokens = sum(await asyncio.gather(*(one(index, body) for index, body in enumerate(bodies))))
        return tokens, time.perf_counter() - start


async def measured_rollout(
    args: Args, rollout_id: int, data_source: DataSource, context: RolloutContext
) -> RolloutResult:
    """Run the built-in rollout and as many requests without slime, in alternating order (--rollout-function-path)."""
    rng = random.Random(rollout_id)
    encode: Any = context.tokenizer.encode
    prompts = [ids for _ in range(PROMPTS) for ids in [encode(made_up(rng))] * SAMPLES]
    record: dict[str, float] = {"graphs": await decodes_by_graphs(context)}

    async def direct() -> None:
        tokens, seconds = await straight(args, context, prompts, rollout_id)
        record.update(direct_tokens=tokens, direct_seconds=seconds, prompt_tokens=len(prompts[0]))

    if rollout_id % 2:
        await direct()
    start = time.perf_counter()
    result = await collect.generate_rollout(args, rollout_id, data_source, context)
    samples = [sample for group in result.groups for sample in group]
    from_samples(samples, args.reward_key)  # as the rollout manager does before training
    record.update(slime_seconds=time.perf_counter() - start, slime_tokens=sum(s.response_length for s in samples))
    if not rollout_id % 2:
        await direct()
    assert args.log_dir is not None
    with (Path(args.log_dir) / SPEEDS).open("a") as file:
        file.write(json.dumps(record) + "\n")
    return result


@check(gpus=1, minutes=6)
def rollout_speed(report: Report) -> None:
    """Send 256 requests of 128 + 512 tokens to a random Qwen3-0.6B, through slime and directly to SGLang."""
    measure(report, "scripts/models/qwen3-0.6B.sh", [*PLAIN_ENGINE, "--bf16"])


def measure(report: Report, model: str, engine: Sequence[str], *, new_tokens: int = NEW_TOKENS) -> None:
    log_dir = kept_directory(report, "run")
    with scratch() as directory:
        start = time.monotonic()
        run(["tools/make_random_checkpoint.py", "--from-args", model, "--out", str(directory / "hf")])
        report.row("seconds to make the checkpoint", time.monotonic() - start)
        rng = random.Random(-1)
        lines = [json.dumps({"prompt": made_up(rng), "label": "0"}) + "\n" for _ in range(PROMPTS * ROUNDS)]
        (directory / "prompts.jsonl").write_text("".join(lines))
        start = time.monotonic()
        words = ["--hf-checkpoint", str(directory / "hf"), "--prompt-data", str(directory / "prompts.jsonl")]
        words += ["--input-key", "prompt", "--label-key", "label", "--rm-type", "random", "--debug-rollout-only"]
        words += ["--rollout-function-path", "tests.gpu.rollout_speed.measured_rollout", "--rollout-num-gpus", "1"]
        words += ["--num-rollout", str(ROUNDS), "--rollout-batch-size", str(PROMPTS)]
        words += ["--n-samples-per-prompt", str(SAMPLES), "--rollout-max-response-len", str(new_tokens), *engine]
        train(words, log_dir)
        report.row("seconds of the run, with the engine's start", time.monotonic() - start)
    rounds = [json.loads(line) for line in (log_dir / SPEEDS).read_text().splitlines()]
    asked = PROMPTS * SAMPLES * new_tokens
    least = min(min(each["direct_tokens"], each["slime_tokens"]) for each in rounds)
    graphs = all(each["graphs"] for each in rounds)
    report.row("the engine generates with CUDA graphs", graphs, True, graphs)
    report.row("prompt tokens", rounds[0]["prompt_tokens"], PROMPT_TOKENS, rounds[0]["prompt_tokens"] == PROMPT_TOKENS)
    report.row(
        "fewest new tokens of a round (it may end a text by chance)", least, f">= 0.97 x {asked}", least >= 0.97 * asked
    )
    speeds = {
        way: [each[f"{way}_tokens"] / each[f"{way}_seconds"] for each in rounds[1:]] for way in ("direct", "slime")
    }
    for way, values in speeds.items():
        shown = " ".join(f"{value:,.0f}" for value in values)
        report.row(f"{way}: new tokens a second, median", statistics.median(values), f"rounds: {shown}")
    share = statistics.median(slime / direct for slime, direct in zip(speeds["slime"], speeds["direct"], strict=True))
    report.row("slime / direct, median of the rounds", share, f">= {SMALLEST_SHARE:g}", share >= SMALLEST_SHARE)
