"""The way of a token from an engine's answer to the training batch, and the event loop while thousands arrive.

    python -m bench.arrival           (make bench-arrival)

Two measurements. `tokens`: each step of the way alone, in CPU time of one thread, in turns with `orjson.loads` of the
same answers, which makes Python objects of them and nothing else. `loop`: the real collector, client, rewards and batch
with all requests of a rollout in flight at once, against servers on this machine that answer after a time with canned
tokens; the longest time for which the loop stood still is counted, also when it is stopped on purpose.

Invariant: no answer is lost; the batch has all tokens with their log-probs.
"""

from __future__ import annotations

import argparse
import asyncio
import pickle
import random
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bench.common import OUTPUTS, ROOT, Goal, Spread, Table, in_turns, machine, write_result
from slime.config.args import Args
from slime.core.batch import TrainBatch, from_samples
from slime.core.sample import Sample, Status
from slime.engine.client import EngineClient
from slime.engine.generate_answer import read_answer
from slime.engine.protocol import GenerateResponse, SamplingParams
from slime.engine.server_process import find_free_port
from slime.rollout.collect import generate_rollout
from slime.rollout.context import RolloutContext
from slime.rollout.generate import append_response
from slime.rollout.intervals import PhaseIntervals
from slime.rollout.metrics import Tally, rollout_metrics
from slime.rollout.reward_pool.pool import RewardPool

GOAL_NS, GOAL_STOP_S = 60.0, 1.0
PROMPT = 200
VOCABULARY = 150_000
REFERENCE_S = 0.1
"""Seconds of `sum(range(10**7))` on the core whose nanoseconds are reported as normalised."""


def make_tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of random words of four letters on average, as large as those of real models."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    draw = random.Random(0)
    words = dict.fromkeys(letters)
    while len(words) < size:
        words["".join(draw.choices(letters[65:91], k=draw.randint(2, 6)))] = None
    inner = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="!")


def make_answer(length: int, seed: int, vocabulary: int = VOCABULARY) -> bytes:
    """Return the body of an engine's answer with `length` tokens, in SGLang's form."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(300, vocabulary, length).tolist()
    log_probs = (-rng.exponential(0.5, length).astype(np.float32)).astype(float).tolist()
    meta: dict[str, Any] = {
        "id": f"{seed:032x}",
        "finish_reason": {"type": "stop", "matched": 2},
        "prompt_tokens": PROMPT,
        "weight_version": "1",
        "completion_tokens": length,
        "cached_tokens": 0,
        "e2e_latency": 1.0,
        "output_token_logprobs": [[log_prob, token, None] for log_prob, token in zip(log_probs, ids, strict=True)],
    }
    return orjson.dumps({"text": "word" * length, "output_ids": ids, "meta_info": meta})


# ---- each step alone


@dataclass
class Steps:
    """The steps of the way for the answers of one rollout; each call of one measures it once."""

    answers: Sequence[bytes]
    context: RolloutContext
    num_tokens: int
    found: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    def peer(self) -> float:
        """Return the normalised nanoseconds a token of `orjson.loads`."""
        seconds, _ = _timed(lambda: [orjson.loads(raw) and None for raw in self.answers])
        return self._normalised(seconds)

    def ours(self) -> float:
        """Walk the whole way once; return the normalised nanoseconds a token of all steps."""
        args, context = self.context.args, self.context
        prompt = list(range(300, 300 + PROMPT))
        samples = [
            Sample(group_index=i // 16, index=i, tokens=list(prompt), prompt_length=PROMPT)
            for i in range(len(self.answers))
        ]
        responses = self._step("answer to arrays", lambda: [read_answer(raw) for raw in self.answers])
        texts = self._step("tokens to text", lambda: [_text(context, response) for response in responses])
        self._step("append to the sample", lambda: _append_all(args, samples, responses, context, texts))
        for sample in samples:
            sample.reward, sample.metadata = float(sample.index % 2), {"start_rollout_id": 0}
        groups = [samples[i : i + 16] for i in range(0, len(samples), 16)]
        kept = self._step("copies of kept groups", lambda: [[s.copy() for s in group] for group in groups])
        self._step("payload for a built-in reward", lambda: [pickle.dumps(s.to_graded_text()) for s in samples])
        self._step("metrics", lambda: rollout_metrics(args, kept, Tally(), PhaseIntervals(), 1))
        batch = self._step("training batch", lambda: from_samples([s for group in kept for s in group]))
        check_batch(batch, self.answers)
        factor = self._normalised(1.0)
        for times in self.found.values():
            times[-1] *= factor
        return sum(times[-1] for times in self.found.values())

    def _step(self, name: str, work: Callable[[], Any]) -> Any:
        seconds, result = _timed(work)
        self.found.setdefault(name, []).append(seconds)
        return result

    def _normalised(self, seconds: float) -> float:
        return seconds / slowness() / self.num_tokens * 1e9


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.thread_time()
    result = work()
    return time.thread_time() - begin, result


def slowness() -> float:
    """Return how many times slower this core is now than the one whose nanoseconds are reported."""
    return _timed(lambda: sum(range(2 * 10**6)))[0] / (REFERENCE_S / 5)


def _text(context: RolloutContext, response: GenerateResponse) -> str:
    return context.token_text.decode(response.tokens_R, skip_special_tokens=False)


def _append_all(
    args: Args,
    samples: Sequence[Sample],
    responses: Sequence[GenerateResponse],
    context: RolloutContext,
    texts: Sequence[str],
) -> None:
    for sample, response, text in zip(samples, responses, texts, strict=True):
        append_response(args, sample, response, context, SamplingParams(), text)


def check_batch(batch: TrainBatch, answers: Sequence[bytes]) -> None:
    """Check that the first and the last row of the batch hold what the answers hold."""
    tokens, log_probs = batch.rows("tokens"), batch.rows("rollout_log_probs")
    for place in (0, -1):
        data = orjson.loads(answers[place])
        rows = data["meta_info"]["output_token_logprobs"]
        assert tokens[place][PROMPT:].tolist() == data["output_ids"]
        assert log_probs[place].tolist() == [np.float32(row[0]) for row in rows]


def measure_steps(length: int, num_answers: int, rounds: int, tokenizer: PreTrainedTokenizerFast) -> Table:
    """Measure each step with `num_answers` answers of `length` tokens, in turns with the peer."""
    args = Args()
    context = RolloutContext(args, None, tokenizer, RewardPool(args))
    answers = [make_answer(length, seed, len(tokenizer)) for seed in range(num_answers)]
    steps = Steps(answers, context, length * num_answers)
    _ = context.token_text
    found = in_turns({"peer": steps.peer, "ours": steps.ours}, rounds=rounds)
    table = Table(f"{num_answers} answers of {length:,} tokens", ["step", "ns a token", "share of orjson.loads"])
    peer = Spread.of(found["peer"])
    for name, times in [*steps.found.items(), ("all of them", found["ours"])]:
        spread = Spread.of(times[-rounds:])
        table.rows.append((name, spread.show(1), f"{spread.median / peer.median:.2f}"))
    table.rows.append(("`orjson.loads` alone", peer.show(1), "1.00"))
    size = sum(map(len, answers)) / (length * num_answers)
    table.note = (
        f"An answer has {size:.1f} bytes a token. CPU time of one thread, normalised to a core that sums "
        f"`range(10**7)` in {REFERENCE_S * 1e3:g} ms; medians over {rounds} turns."
    )
    return table


# ---- the loop


async def serve(port: int, length: int, seconds: float) -> None:
    """Answer /generate with canned tokens after `seconds` / 2 to `seconds`, and all else with an empty object."""
    bodies = [make_answer(length, seed) for seed in range(4)]
    draw = random.Random(port)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                size = 0
                while (header := await reader.readline()) not in (b"\r\n", b""):
                    if header.lower().startswith(b"content-length"):
                        size = int(header.split(b":")[1])
                await reader.readexactly(size)
                body = b"{}"
                if line.split()[1] == b"/generate":
                    await asyncio.sleep(draw.uniform(seconds / 2, seconds))
                    body = draw.choice(bodies)
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                writer.write(head % len(body))
                writer.write(body)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", port, backlog=8192)
    async with server:
        await server.serve_forever()


class Prompts:
    """A data source without an end, whose prompts all have the same tokens."""

    num_prompts = 1

    def __init__(self, num_samples: int) -> None:
        self._num_samples, self._next = num_samples, 0

    def get_groups(self, num: int, *, rollout_id: int) -> list[list[Sample]]:
        groups = range(self._next, self._next + num)
        self._next += num
        tokens = list(range(300, 300 + PROMPT))
        return [
            [
                Sample(group_index=g, index=g * self._num_samples + i, tokens=list(tokens), prompt_length=PROMPT)
                for i in range(self._num_samples)
            ]
            for g in groups
        ]

    def add_groups(self, groups: Sequence[list[Sample]]) -> None:
        assert not groups, "nothing is left over"

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Collected:
    """The measurement of one rollout."""

    wall: float = 0.0
    cpu: float = 0.0
    longest_stop: float = 0.0
    """The longest time between two turns of a task that sleeps for 10 ms, without those 10 ms, in seconds of CPU time.

    Elapsed time would also count what other programs of the machine do.
    """
    failed: int = 0
    tokens: int = 0
    peak_bytes: int = 0


async def collect(
    url: str, num_groups: int, num_samples: int, tokenizer: PreTrainedTokenizerFast, *, stop: float | None
) -> Collected:
    """Make one rollout and its batch; `stop` blocks the loop for so many seconds once requests are on their way."""
    args = Args(
        rollout_batch_size=num_groups,
        n_samples_per_prompt=num_samples,
        rollout_max_response_len=2**20,
        sglang_server_concurrency=2**20,
        rm_type="random",
        rm_num_workers=1,
        architecture=None,
    )
    found, rewards = Collected(), RewardPool(args)
    async with EngineClient(url, engines=[url], patience=60.0) as client:
        context = RolloutContext(args, client, tokenizer, rewards, policy_version=1)
        _ = context.token_text
        watch = asyncio.create_task(_watch(found))
        if stop is not None:
            asyncio.get_running_loop().call_later(1.0, time.sleep, stop)
        begin, cpu = time.perf_counter(), time.process_time()
        result = await generate_rollout(args, 0, Prompts(num_samples), context)
        samples = [sample for group in result.groups for sample in group]
        batch = await asyncio.to_thread(from_samples, samples)
        found.wall, found.cpu = time.perf_counter() - begin, time.process_time() - cpu
        watch.cancel()
    rewards.close()
    found.failed = sum(sample.status is not Status.COMPLETED for sample in samples)
    found.tokens = int(batch.response_lengths_N.sum())
    found.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


async def _watch(found: Collected) -> None:
    while True:
        begin = time.thread_time()
        await asyncio.sleep(0.01)
        found.longest_stop = max(found.longest_stop, time.thread_time() - begin)


def measure_loop(options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> tuple[Table, list[Collected]]:
    """Make two rollouts against servers of this machine, the second with a stop of the loop."""
    table = Table(
        f"{options.groups * options.samples:,} requests at once, {options.length:,} tokens each",
        ["", "failed", "longest stop, s of CPU", "CPU, ns a token", "wall, s", "peak memory, GB"],
    )
    port = find_free_port()
    serving = ["--serve", "--length", str(options.length), "--seconds", str(options.seconds), "--port", str(port)]
    server = subprocess.Popen([sys.executable, "-W", "ignore", "-m", "bench.arrival", *serving], cwd=ROOT)
    try:
        _wait_for(port)
        rollouts: list[Collected] = []
        for name, stop in (("undisturbed", None), (f"loop blocked for {options.stop:g} s", options.stop)):
            url = f"http://127.0.0.1:{port}"
            made = asyncio.run(collect(url, options.groups, options.samples, tokenizer, stop=stop))
            rollouts.append(made)
            per_token = made.cpu / slowness() / made.tokens * 1e9
            table.rows.append(
                (
                    name,
                    str(made.failed),
                    f"{made.longest_stop / slowness():.2f}",
                    f"{per_token:.0f}",
                    f"{made.wall:.0f}",
                    f"{made.peak_bytes / 1e9:.1f}",
                )
            )
    finally:
        server.kill()
        server.wait()
    table.note = (
        f"Engines answer after {options.seconds / 2:g} to {options.seconds:g} s. CPU of this process includes sockets "
        "and HTTP; both are normalised as above."
    )
    return table, rollouts


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as connection:
            if connection.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"no server listens at port {port}")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write outputs/bench/arrival.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192, help="tokens of an answer")
    parser.add_argument("--answers", type=int, default=64, help="answers of a turn of the steps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--groups", type=int, default=512)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--stop", type=float, default=11.0, help="seconds; a connection has to open within 10")
    parser.add_argument("--seconds", type=float, default=60.0, help="the longest time that a server takes to answer")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "arrival.json")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve:
        asyncio.run(serve(options.port, options.length, options.seconds))
        return
    facts = machine()
    tokenizer = make_tokenizer()
    steps = measure_steps(options.length, options.answers, options.rounds, tokenizer)
    per_token = float(steps.rows[-2][1].split()[0])
    loop, rollouts = measure_loop(options, tokenizer)
    stop = float(loop.rows[0][2])
    goals = [
        Goal(f"{GOAL_NS:g} ns a token, over all steps", GOAL_NS / per_token, 1.0),
        Goal(f"{GOAL_STOP_S:g} s, over the longest stop", GOAL_STOP_S / max(stop, 1e-3), 1.0),
        Goal("answered requests, of all", min(_answered(made, options) for made in rollouts), 1.0),
    ]
    write_result(options.out, [steps, loop], goals, facts, {"rollouts": [vars(made) for made in rollouts]})


def _answered(made: Collected, options: argparse.Namespace) -> float:
    return 1 - made.failed / (options.groups * options.samples)


if __name__ == "__main__":
    main()
