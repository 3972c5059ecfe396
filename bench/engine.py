"""The embedded engine, over HTTP through the router, against Hugging Face `generate` with the same model and batch.

    python -m bench.engine            (make bench-engine)

Both sides generate the same numbers of tokens for the same prompts with the same sampling (temperature 1, whole
distribution), in alternation. Invariant: every doubt is decided in favour of the peer. It has no HTTP, computes
log-probs only if the row says so, and uses the faster of its caches; the engine's figures include HTTP, router, client
and the log-prob of every token.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch

from bench.common import OUTPUTS, Busy, Goal, Spread, Table, in_turns, machine, ratios, thread_cpu_seconds, write_result
from slime.cli.arithmetic.make_task import make_model, make_tokenizer
from slime.config.args import Args
from slime.engine.client import EngineClient
from slime.engine.embedded.cache import KVCache
from slime.engine.embedded.model import Model
from slime.engine.embedded.scheduler import Request, Scheduler
from slime.engine.launch import launch_engine, launch_router
from slime.engine.membership import register_worker
from slime.engine.protocol import GenerateRequest, SamplingParams
from slime.engine.server_process import ManagedProcess, find_free_port

GOAL_EQUAL, GOAL_SPREAD = 1.5, 2.5


class Batch:
    """Prompts, and the number of tokens to generate for each."""

    def __init__(self, prompts: Sequence[list[int]], new_tokens: Sequence[int]) -> None:
        self.prompts, self.new_tokens = list(prompts), list(new_tokens)

    @property
    def num_tokens(self) -> int:
        return sum(self.new_tokens)


def make_batch(tokenizer: Any, size: int, low: int, high: int, *, seed: int) -> Batch:
    """Return `size` different problems, with lengths uniform in low..high."""
    rng = random.Random(seed)
    prompts = []
    for _ in range(size):
        problem = [{"role": "user", "content": f"{rng.randint(1, 9999)}+{rng.randint(10, 99)}=?"}]
        text = tokenizer.apply_chat_template(problem, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer.encode(text, add_special_tokens=False))
    return Batch(prompts, [rng.randint(low, high) for _ in range(size)])


class OurEngine:
    """One embedded engine with a router in front, and a client in an event loop of its own thread."""

    def __init__(self, model_dir: Path, logs: Path, *, threads: int, stack: ExitStack) -> None:
        args = Args(hf_checkpoint=str(model_dir), cpu_threads_per_process=threads, bf16=False)
        host = "127.0.0.1"
        self.engine = self._start(
            stack, launch_engine(args, index=0, host=host, port=find_free_port(), log_path=logs / "engine.log")
        )
        self.router = self._start(
            stack, launch_router(args, host=host, port=find_free_port(), log_path=logs / "router.log")
        )
        register_worker(self.router.url, self.engine.url)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._client = EngineClient(self.router.url)
        stack.callback(lambda: self._run(self._client.close()))

    @staticmethod
    def _start(stack: ExitStack, process: ManagedProcess) -> ManagedProcess:
        stack.callback(process.stop)
        process.wait_ready(120)
        return process

    def _run(self, coroutine: Any) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result()

    def seconds(self, batch: Batch) -> float:
        """Return the wall seconds until the last response arrives."""

        async def one(prompt: list[int], count: int) -> int:
            params = SamplingParams(temperature=1.0, max_new_tokens=count, ignore_eos=True)
            response = await self._client.generate(GenerateRequest(input_ids=prompt, sampling_params=params))
            assert len(response.log_probs) == count
            return count

        async def everything() -> list[int]:
            return await asyncio.gather(*map(one, batch.prompts, batch.new_tokens))

        start = time.perf_counter()
        assert sum(self._run(everything())) == batch.num_tokens
        return time.perf_counter() - start


class Peer:
    """Hugging Face `generate` on one batch, padded on the left, run until its longest response ends."""

    def __init__(self, model_dir: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()

    def seconds(self, batch: Batch, *, threads: int, log_probs: bool = False, cache: str = "dynamic") -> float:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        width = max(map(len, batch.prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch.prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch.prompts])
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max(batch.new_tokens),
                eos_token_id=None,
                pad_token_id=0,
                use_cache=True,
                cache_implementation=None if cache == "dynamic" else cache,
                disable_compile=True,
                output_logits=log_probs,
                return_dict_in_generate=True,
            )
            new = out.sequences[:, width:]
            assert new.shape[1] == max(batch.new_tokens)
            if log_probs:
                logits = torch.stack(out.logits, dim=1)
                chosen = logits.gather(-1, new[..., None]).squeeze(-1) - logits.logsumexp(-1)
                assert chosen.shape == new.shape
            new.tolist()
        return time.perf_counter() - start


class Inside:
    """The engine's own model and scheduler in this process, with a stopwatch around each part of a step."""

    def __init__(self, model_dir: Path) -> None:
        from slime.config.architecture import hf_architecture, read_hf_config
        from slime.engine.embedded import scheduler as module

        architecture = hf_architecture(read_hf_config(model_dir))
        self.parts: dict[str, float] = {}
        model = Model(architecture)
        self._watch(model, "prefill", "prefill")
        self._watch(model, "decode", "decode")
        self._watch(model, "logits", "output layer")
        self._sampler_module = module
        cache = KVCache(architecture, dtype=torch.float32, rows=256, tokens=256 * 512)
        self._watch(cache, "copy", "moving cache rows")
        self._finished: list[Request] = []
        self.scheduler = Scheduler(model, cache, on_finished=self._finished.extend, on_failure=lambda _: None)

    def _watch(self, owner: Any, name: str, part: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)

    def run(self, batch: Batch) -> dict[str, float]:
        """Return the seconds of each part, and `all`."""
        torch.set_num_threads(1)
        self.parts.clear()
        original = self._sampler_module.sample
        self._watch(self._sampler_module, "sample", "sampling")
        start = time.perf_counter()
        try:
            with torch.inference_mode():
                for index, (prompt, count) in enumerate(zip(batch.prompts, batch.new_tokens, strict=True)):
                    self.scheduler.submit(
                        Request(
                            rid=str(index),
                            input_ids=prompt,
                            params=SamplingParams(max_new_tokens=count, ignore_eos=True),
                            seed=index,
                            stop_token_ids=frozenset(),
                        )
                    )
                self.scheduler._take_commands()
                while self.scheduler.num_running or self.scheduler.num_waiting:
                    self.scheduler.step()
        finally:
            self._sampler_module.sample = cast(Any, original)
        return {**self.parts, "all": time.perf_counter() - start}


def compare(
    ours: OurEngine, peer: Peer, batch: Batch, *, threads: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return tokens/s of each side by turn, and CPU seconds (and wall time) of our side's processes over its turns."""
    usage: dict[str, float] = {}

    def our_turn() -> float:
        before = thread_cpu_seconds(ours.engine.pid)
        with Busy(router=ours.router.pid) as busy:
            client = time.process_time()
            seconds = ours.seconds(batch)
            client = time.process_time() - client
        after = thread_cpu_seconds(ours.engine.pid)
        spent = {thread: used - before.get(thread, 0.0) for thread, used in after.items()}
        http = spent.pop(ours.engine.pid)
        parts = {"steps": sum(spent.values()), "http": http, "client": client, **busy.seconds, "wall": seconds}
        for name, value in parts.items():
            usage[name] = usage.get(name, 0.0) + value
        return batch.num_tokens / seconds

    def peer_turn(**options: Any) -> Callable[[], float]:
        return lambda: batch.num_tokens / peer.seconds(batch, **options)

    sides = {
        "slime": our_turn,
        "generate": peer_turn(threads=threads),
        "generate, log-probs": peer_turn(threads=threads, log_probs=True),
        "generate, all cores": peer_turn(threads=2),
    }
    usage.clear()
    found = in_turns(sides, rounds=rounds)
    return found, usage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concurrent", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--equal", type=int, default=64, help="new tokens of each request")
    parser.add_argument("--low", type=int, default=8, help="of the spread lengths")
    parser.add_argument("--high", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of the engine's steps, and of generate")
    parser.add_argument("--out", type=Path, default=OUTPUTS / "engine.json")
    given = parser.parse_args()
    facts = machine()
    speed = Table(
        f"New tokens/s, {given.threads} thread(s) each",
        [
            "batch",
            "slime",
            "`generate`",
            "ratio",
            "`generate` with log-probs",
            "ratio",
            "`generate`, 2 threads",
            "ratio",
        ],
    )
    where = Table(
        "Where the engine's time goes: CPU seconds by thread, share of the wall time",
        ["batch", "engine: steps", "engine: HTTP and JSON", "router", "client", "steps idle or preempted"],
        note="Shares may sum to more than 100 %: the threads run in parallel on two cores.",
    )
    parts = Table(
        "Within the engine's steps (the same scheduler in one process, without HTTP)",
        ["batch", "prefill", "decode", "output layer", "sampling", "moving cache rows", "rest: Python", "tokens/s"],
    )
    goals: list[Goal] = []
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        directory = Path(temporary)
        make_model(1).save_pretrained(directory / "model")
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(directory / "model")
        ours = OurEngine(directory / "model", directory, threads=given.threads, stack=stack)
        peer, inside = Peer(directory / "model"), Inside(directory / "model")
        for size in given.concurrent:
            for low, high in ((given.equal, given.equal), (given.low, given.high)):
                batch = make_batch(tokenizer, size, low, high, seed=size)
                name = f"{size} × {low}" if low == high else f"{size} × {low}–{high}"
                found, usage = compare(ours, peer, batch, threads=given.threads, rounds=given.rounds)
                raw[name] = {"tokens_per_second": found, "usage": usage}
                row = [name, Spread.of(found["slime"]).show()]
                for side in ("generate", "generate, log-probs", "generate, all cores"):
                    row += [Spread.of(found[side]).show(), ratios(found["slime"], found[side]).show(2)]
                speed.rows.append(row)
                ratio = ratios(found["slime"], found["generate"]).median
                kind, goal = ("equal", GOAL_EQUAL) if low == high else ("spread", GOAL_SPREAD)
                goals.append(Goal(f"engine / generate, {size} concurrent, {kind} lengths", ratio, goal))
                where.rows.append([name, *usage_shares(usage)])
                inside.run(batch)
                seconds = inside.run(batch)
                raw[name]["inside"] = seconds
                parts.rows.append([name, *part_shares(seconds), f"{batch.num_tokens / seconds['all']:,.0f}"])
    write_result(given.out, [speed, where, parts], goals, facts, raw)


def usage_shares(usage: dict[str, float]) -> list[str]:
    wall = usage["wall"]
    shares = [usage[name] / wall for name in ("steps", "http", "router", "client")]
    return [f"{share:.0%}" for share in (*shares, max(0.0, 1 - shares[0]))]


def part_shares(seconds: dict[str, float]) -> list[str]:
    names = ("prefill", "decode", "output layer", "sampling", "moving cache rows")
    shares = [seconds.get(name, 0.0) / seconds["all"] for name in names]
    return [f"{share:.0%}" for share in (*shares, 1 - sum(shares))]


if __name__ == "__main__":
    main()
