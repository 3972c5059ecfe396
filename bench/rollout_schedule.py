"""How well a rollout keeps its engines busy: plain, over-sampling, over-sampling with partial rollout, and async.

    python -m bench.rollout_schedule      (make bench-rollout)

The collector, data buffer, rewards, router, protocol, scheduler and slots are the real ones; only a forward pass is a
timed sleep (`timed_engine`), and so is a training step (`schedule_loops`). Each mode has its own prompts, buffer and
turns; all modes share the engines and get new weights before every rollout. Invariant: a mode keeps its own leftovers:
what was generated is trained on, carried in its buffer, or counted as thrown away.

    limit: the same engines with more independent requests than slots at all times, so that nothing ever waits.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.common import OUTPUTS, Goal, Spread, Table, in_turns, machine, ratios, tree_cpu_seconds, write_result
from bench.schedule_loops import compare_loops
from bench.timed_engine import Timing, launch_timed_engine, make_model, make_prompts
from slime.config.args import Args
from slime.core.sample import Sample
from slime.core.sample_columns import from_columns
from slime.engine.client import EngineClient
from slime.engine.launch import launch_router
from slime.engine.membership import register_worker
from slime.engine.protocol import GenerateRequest, GenerateResponse
from slime.engine.server_process import ManagedProcess, find_free_port
from slime.rollout.collect import generate_rollout
from slime.rollout.context import RolloutContext, RolloutResult
from slime.rollout.data_buffer import DataBuffer
from slime.rollout.generate import generate_sample, rollout_sampling_params, sampling_seed
from slime.rollout.reward_pool.pool import RewardPool
from slime.rollout.tokenizer import load_tokenizer

GOAL_PLAIN, GOAL_LIMIT = 1.25, 0.85
MODES = {
    "plain": (1.0, False),
    "over-sampling × 1.5": (1.5, False),
    "the same, partial": (1.5, True),
    "over-sampling × 2, partial": (2.0, True),
}
"""For each mode: the factor of over-sampling at the start, and whether unfinished samples continue next time."""
PARTIAL = "over-sampling × 2, partial"
PARTS = ("timed", "loops", "real")


class CountingClient(EngineClient):
    """Counts the tokens that the engines generate, whatever happens to them."""

    tokens = 0

    async def generate(self, request: GenerateRequest) -> GenerateResponse:
        response = await super().generate(request)
        self.tokens += len(response.output_ids)
        return response


@dataclass(frozen=True)
class Shape:
    """The sizes of rollouts and engines."""

    prompts: int
    samples: int
    """Samples of each prompt."""
    engines: int
    slots: int
    """The number of requests that one engine runs at a time."""
    prompt_length: int = 32

    @property
    def batch(self) -> int:
        return self.prompts * self.samples


@dataclass
class Record:
    """The result of a mode in the counted turns; tokens are response tokens."""

    seconds: list[float] = field(default_factory=list[float])
    """Seconds of each rollout."""
    lengths: list[int] = field(default_factory=list[int])
    """Lengths of the samples that are trained on."""
    generated: int = 0
    carried: int = 0
    """The number of tokens of interrupted samples that have not been continued yet."""
    off_policy: int = 0
    cpu: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def kept(self) -> int:
        return sum(self.lengths)

    @property
    def thrown_away(self) -> float:
        """The share of generated tokens that will never be trained on."""
        return (self.generated - self.kept - self.carried) / self.generated


class Engines:
    """Engines with a router, one client, and the model's files."""

    def __init__(self, timing: Timing, shape: Shape, *, layers: int, hidden: int, stack: ExitStack) -> None:
        self.timing, self.shape = timing, shape
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.model = make_model(directory / "model", timing, layers=layers, hidden=hidden)
        self.prompts = make_prompts(directory / "prompts.jsonl", 4096, shape.prompt_length)
        args = Args(hf_checkpoint=str(self.model))
        self.router = launch_router(args, host="127.0.0.1", port=find_free_port(), log_path=directory / "router.log")
        stack.callback(self.router.stop)
        self.engines: list[ManagedProcess] = []
        for index in range(shape.engines):
            log = directory / f"engine-{index}.log"
            self.engines.append(launch_timed_engine(self.model, timing, slots=shape.slots, log=log))
            stack.callback(self.engines[-1].stop)
        for process in (self.router, *self.engines):
            process.wait_ready(120)
        for url in self.urls:
            register_worker(self.router.url, url)
        self.loop = stack.enter_context(closing(asyncio.new_event_loop()))
        self.client = CountingClient(self.router.url)
        stack.callback(lambda: self.loop.run_until_complete(self.client.close()))
        self.tokenizer = load_tokenizer(args)
        self._version = 0

    @property
    def urls(self) -> list[str]:
        return [engine.url for engine in self.engines]

    async def take_weights(self) -> int:
        """Sync weights as between two rollouts; return the new policy version."""
        self._version += 1
        await self.client.flush_cache()
        await self.client.update_weights_from_disk(str(self.model), str(self._version))
        return self._version

    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU seconds of each part's processes until now."""
        engines = sum(tree_cpu_seconds(engine.pid) for engine in self.engines)
        router, own = tree_cpu_seconds(self.router.pid), time.process_time()
        everything = tree_cpu_seconds(os.getpid())
        return {
            "engines": engines,
            "router": router,
            "collector": own,
            "rewards": max(0.0, everything - engines - router - own),
        }


class Schedule:
    """One mode: its prompts, its buffer, and its rollouts so far."""

    def __init__(self, engines: Engines, over_sampling: float, partial: bool) -> None:
        shape = engines.shape
        self.args = Args(
            hf_checkpoint=str(engines.model),
            prompt_data=str(engines.prompts),
            rollout_shuffle=True,
            rollout_batch_size=shape.prompts,
            n_samples_per_prompt=shape.samples,
            over_sampling_batch_size=round(over_sampling * shape.prompts),
            partial_rollout=partial,
            rollout_max_response_len=engines.timing.cap,
            rm_type="random",
            rm_num_workers=1,
        )
        self._engines = engines
        self._source = DataBuffer(self.args, engines.tokenizer)
        self.rewards = RewardPool(self.args)
        self._rollout_id = 0
        self.record = Record()

    def context(self, version: int) -> RolloutContext:
        engines = self._engines
        return RolloutContext(self.args, engines.client, engines.tokenizer, self.rewards, policy_version=version)

    def turn(self, rollouts: int) -> float:
        """Run that many rollouts and return samples per second."""
        self.record.cpu = _added(self.record.cpu, self._engines.cpu_seconds(), sign=-1)
        carried = self._carried()
        before = len(self.record.seconds)
        for _ in range(rollouts):
            self._engines.loop.run_until_complete(self._rollout())
        self.record.carried += self._carried() - carried
        self.record.cpu = _added(self.record.cpu, self._engines.cpu_seconds(), sign=1)
        return rollouts * self._engines.shape.batch / sum(self.record.seconds[before:])

    async def _rollout(self) -> None:
        version = await self._engines.take_weights()
        before, start = self._engines.client.tokens, time.perf_counter()
        result = await self.collect(self.context(version))
        self.record.seconds.append(time.perf_counter() - start)
        self.record.generated += self._engines.client.tokens - before
        samples = [sample for group in result.groups for sample in group]
        self.record.lengths += [sample.response_length for sample in samples]
        versions = [made for sample in samples for made in sample.policy_versions or []]
        self.record.off_policy += sum(made < version for made in versions)

    async def collect(self, context: RolloutContext) -> RolloutResult:
        """Make the next rollout."""
        self._rollout_id += 1
        return await generate_rollout(self.args, self._rollout_id - 1, self._source, context)

    def _carried(self) -> int:
        groups = from_columns(self._source.state_dict()["buffer"])
        return sum(sample.response_length for group in groups for sample in group)


class Limit:
    """Independent requests, always more of them than slots."""

    def __init__(self, engines: Engines, schedule: Schedule) -> None:
        """Take prompts and sampling from `schedule`."""
        self._engines, self._schedule = engines, schedule
        self._source = DataBuffer(schedule.args, engines.tokenizer)
        self._prompts = iter(self._endless_prompts())
        self.record = Record()

    def turn(self, seconds: float) -> float:
        """Return samples per second: tokens per second by the mean length, where a few truncated ones do not matter."""
        tokens = self._engines.client.tokens
        self.record.cpu = _added(self.record.cpu, self._engines.cpu_seconds(), sign=-1)
        spent = self._engines.loop.run_until_complete(self._keep_busy(seconds))
        self.record.cpu = _added(self.record.cpu, self._engines.cpu_seconds(), sign=1)
        tokens = self._engines.client.tokens - tokens
        self.record.seconds.append(spent)
        self.record.generated += tokens
        return tokens / spent / self._engines.timing.mean_length

    def _endless_prompts(self) -> Any:
        while True:
            yield from (sample for group in self._source.get_groups(16, rollout_id=0) for sample in group)

    async def _keep_busy(self, seconds: float) -> float:
        context = self._schedule.context(await self._engines.take_weights())
        params = rollout_sampling_params(self._schedule.args)
        start = time.perf_counter()
        ending = False

        async def requests() -> None:
            while not ending:
                sample: Sample = next(self._prompts)
                own = replace(params, sampling_seed=sampling_seed("limit", sample.index))
                await generate_sample(self._schedule.args, sample, own, context)

        shape = self._engines.shape
        tasks = [asyncio.create_task(requests()) for _ in range(2 * shape.engines * shape.slots)]
        await asyncio.sleep(seconds)
        ending = True
        await self._engines.client.abort_all()
        spent = time.perf_counter() - start
        async with asyncio.timeout(60):
            while any(not task.done() for task in tasks):
                await self._engines.client.abort_all()  # requests that were still in the router
                await asyncio.wait(tasks, timeout=0.1)
        await asyncio.gather(*tasks)
        return spent


def _added(sums: dict[str, float], more: dict[str, float], *, sign: int) -> dict[str, float]:
    return {name: sums.get(name, 0.0) + sign * value for name, value in more.items()}


def compare(
    engines: Engines, modes: Sequence[str], *, rollouts: int, rounds: int, warmup: int
) -> tuple[dict[str, list[float]], dict[str, Record]]:
    """Return samples per second of the limit and of each mode by turn, and the record of each mode.

    Args:
        warmup: rollouts until a buffer with unfinished groups has its usual size; other modes need none.
    """
    with ExitStack() as stack:
        schedules = {name: Schedule(engines, *MODES[name]) for name in modes}
        for schedule in schedules.values():
            stack.callback(schedule.rewards.close)
        limit = Limit(engines, schedules["plain"])
        rate = engines.shape.engines * engines.shape.slots / (engines.timing.step or 0.005)
        seconds = rollouts * engines.shape.batch * engines.timing.mean_length / rate
        sides: dict[str, Callable[[], float]] = {"limit": lambda: limit.turn(seconds)}
        sides |= {name: lambda s=schedule: s.turn(rollouts) for name, schedule in schedules.items()}
        for schedule in schedules.values():
            schedule.turn(max(1, warmup) if schedule.args.partial_rollout else 1)
            schedule.record = Record()
        limit.turn(min(1.0, seconds))
        limit.record = Record()
        found = in_turns(sides, rounds=rounds, warmup=0)
    return found, {"limit": limit.record, **{name: schedule.record for name, schedule in schedules.items()}}


def speed_table(title: str, note: str, engines: Engines, found: dict[str, list[float]], records: Any) -> Table:
    table = Table(
        title,
        [
            *("mode", "rollouts/s", "of plain", "of the limit", "seconds a rollout", "tokens/s generated"),
            *("mean length trained on", "tokens thrown away", "tokens off-policy"),
        ],
        note=note,
    )
    for name, rates in found.items():
        record: Record = records[name]
        row = [name, Spread.of(rates).show(1)]
        row += [ratios(rates, found["plain"]).show(2), ratios(rates, found["limit"]).show(2)]
        if name == "limit":
            speed = record.generated / sum(record.seconds)
            table.rows.append([*row, "", f"{speed:,.0f}", f"{engines.timing.mean_length:.0f}", "0%", "0%"])
            continue
        row += [Spread.of(record.seconds).show(2), f"{record.generated / sum(record.seconds):,.0f}"]
        row += [f"{statistics.fmean(record.lengths):.0f}", f"{record.thrown_away:.0%}"]
        table.rows.append([*row, f"{record.off_policy / record.kept:.0%}"])
    return table


def cpu_table(title: str, records: dict[str, Record]) -> Table:
    parts = ("engines", "router", "collector", "rewards")
    table = Table(
        title,
        ["mode", *parts, "all"],
        note="Share of one core; `engines` holds their schedulers and HTTP, `collector` this whole process.",
    )
    for name, record in records.items():
        shares = [record.cpu[part] / sum(record.seconds) for part in parts]
        table.rows.append([name, *(f"{share:.0%}" for share in (*shares, sum(shares)))])
    return table


def describe(timing: Timing, shape: Shape) -> str:
    if timing.step is None:
        compute = "engines compute, on these cores"
    else:
        compute = f"a decode step takes {1e3 * timing.step:g} ms whatever its batch, "
        compute += f"a prompt token {1e6 * timing.prefill_token:g} µs"
    lengths = f"mu = ln {timing.median:g}, sigma = {timing.sigma:g}, cut at {timing.cap}"
    return (
        f"{shape.prompts} prompts × {shape.samples} samples a rollout; {shape.engines} engines × {shape.slots} slots; "
        f"{compute}. Lengths log-normal, {lengths} ({timing.length_probabilities()[-1]:.1%} are), mean "
        f"{timing.mean_length:.1f}; prompts of {shape.prompt_length} tokens."
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16, help="prompts of a rollout")
    parser.add_argument("--samples", type=int, default=4, help="samples of each prompt")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--slots", type=int, default=16, help="requests that one engine runs at a time")
    parser.add_argument("--median", type=float, default=64, help="exp(mu) of the lengths")
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--cap", type=int, default=320)
    parser.add_argument("--step", type=float, default=0.005, help="seconds of a decode step")
    parser.add_argument("--prefill-token", type=float, default=12.5e-6, help="seconds of a prompt token")
    parser.add_argument("--rollouts", type=int, default=3, help="rollouts of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=4, help="rollouts that do not count, with partial rollout")
    parser.add_argument("--pairs", type=int, default=2, help="runs of each loop")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--out", type=Path, default=OUTPUTS / "rollout.json")
    given = parser.parse_args()
    if "plain" not in given.modes:
        parser.error("--modes: the others are compared with plain; name it, too")
    return given


def main() -> None:
    given = arguments()
    facts = machine()
    shape = Shape(given.prompts, given.samples, given.engines, given.slots)
    timed = Timing(
        median=given.median, sigma=given.sigma, cap=given.cap, step=given.step, prefill_token=given.prefill_token
    )
    tables: list[Table] = []
    goals: list[Goal] = []
    raw: dict[str, Any] = {}

    def measure(engines: Engines, name: str, title: str, *, rounds: int) -> None:
        found, records = compare(engines, given.modes, rollouts=given.rollouts, rounds=rounds, warmup=given.warmup)
        raw[name] = {mode: {"rates": rates, **vars(records[mode])} for mode, rates in found.items()}
        tables.append(speed_table(title, describe(engines.timing, shape), engines, found, records))
        if engines.timing.step is None:
            return
        tables.append(cpu_table("CPU time apart from the sleeps", records))
        if PARTIAL in found:
            goals.append(Goal("partial / plain", ratios(found[PARTIAL], found["plain"]).median, GOAL_PLAIN))
            goals.append(Goal("partial / limit", ratios(found[PARTIAL], found["limit"]).median, GOAL_LIMIT))

    if {"timed", "loops"} & set(given.parts):
        with ExitStack() as stack:
            engines = Engines(timed, shape, layers=1, hidden=32, stack=stack)
            if "timed" in given.parts:
                measure(engines, "timed", "Engines whose forward is a timed sleep", rounds=given.rounds)
            if "loops" in given.parts:
                directory = given.out.with_suffix("")
                shutil.rmtree(directory, ignore_errors=True)
                table, goal, runs = compare_loops(engines, directory, pairs=given.pairs, rollouts=6, skip=1)
                tables.append(table)
                goals.append(goal)
                raw["loops"] = {program: [vars(run) for run in several] for program, several in runs.items()}
    if "real" in given.parts:
        with ExitStack() as stack:
            engines = Engines(replace(timed, step=None), shape, layers=4, hidden=128, stack=stack)
            measure(
                engines, "real", "Engines that compute, on the same cores (no goal)", rounds=max(1, given.rounds - 2)
            )
    write_result(given.out, tables, goals, facts, raw)


if __name__ == "__main__":
    main()
