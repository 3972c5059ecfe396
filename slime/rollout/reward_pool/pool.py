"""RewardPool: computes rewards outside the event loop, in processes that can be killed.

- Called by: `collect` and `evaluate` pass finished samples in and get Verdicts.
- Invariant: whatever a reward function does (hang, crash, raise, leak, return nonsense), it costs only its own task (a
  sample; with --group-rm a group), and the verdict reports it.

    judge -> waiting -> a worker with room -+-> answer -> verdicts
                ^                           +-> worker lost: the task whose code ran fails (timeout, crash, memory) ...
                +---------------------------+-> ... the others are judged again; if it is not known whose code ran,
                                                each of them alone, so that the next time it is known

With a plain function a worker judges one task at a time; with an async one --rm-concurrency tasks are in flight over
all workers.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import pickle
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import orjson

from slime.config.args import Args
from slime.config.eval_data import eval_datasets
from slime.config.reward_types import BOXED_PREFIX, needs_url
from slime.config.secrets import masker_of
from slime.core.awake import AwakeClock
from slime.core.plugins import load_hook
from slime.core.sample import Sample, Status
from slime.rollout.reward_pool.channel import START
from slime.rollout.reward_pool.process import RewardProcess, Task
from slime.rollout.reward_pool.verdict import CRASH, MEMORY, TIMEOUT, Verdict, error_verdict
from slime.rollout.rewards.reward import find_reward, is_async, reward_type

if TYPE_CHECKING:
    from slime.rollout.rewards.remote import RemoteReward

logger = logging.getLogger(__name__)

_START_TIMEOUT = 120.0
"""Seconds for a worker to load the reward function; they do not count against any sample."""
NO_URL = "--rm-url: not given; --rm-type remote_rm sends responses to the judge at that URL; add it"
_NO_REWARD = (
    "--rm-type: not given, and neither is --custom-rm-path nor the data line's metadata.rm_type; "
    "responses need one to be judged"
)


class RewardPool:
    """Computes rewards in `--rm-num-workers` processes, which start when the first sample is judged.

    From the first sample on it belongs to one event loop.

    Raises:
        ValueError: no such --rm-type, or --custom-rm-path cannot be loaded.
    """

    def __init__(self, args: Args) -> None:
        self._args = args
        self._mask = masker_of(args)
        self._is_async = False
        self._capacity = 1
        """The number of tasks in flight at once in each worker."""
        if args.custom_rm_path is not None:
            self._is_async = is_async(load_hook("custom_rm_path", args.custom_rm_path))
            if self._is_async:
                self._capacity = math.ceil(args.rm_concurrency / args.rm_num_workers)
        else:
            for rm_type in (args.rm_type, *(dataset.rm_type for dataset in eval_datasets(args))):
                _check_type(args, rm_type)
        self._remote = _remote_reward(args)
        self._numbers = itertools.count(START + 1)
        self._waiting: deque[Task] = deque()
        self._workers: set[RewardProcess] = set()
        self._starting: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._broken: RuntimeError | None = None
        """Set if a worker could not start, so that no reward can ever be computed."""
        self._watch: asyncio.TimerHandle | None = None
        self._clock = AwakeClock(self._interval)

    @property
    def by_group(self) -> bool:
        """Whether to call `judge_group` instead of `judge`; built-in rewards judge each sample by itself."""
        return self._args.group_rm and self._args.custom_rm_path is not None

    async def judge(self, sample: Sample, *, rm_type: str | None = None) -> Verdict:
        """Return the reward of one sample. `rm_type` replaces --rm-type; the sample's metadata goes before both.

        Raises:
            ValueError: no reward is named for it, or --group-rm requires whole groups.
            RuntimeError: the workers do not start, or are closed.
        """
        if self.by_group:
            raise ValueError("--group-rm: the reward function takes whole groups; call judge_group")
        rm_type = reward_type(self._args, sample, rm_type)
        if rm_type is None and self._args.custom_rm_path is None:
            raise ValueError(_NO_REWARD)
        if rm_type is not None and needs_url(rm_type):
            if self._remote is None:
                raise ValueError(NO_URL)
            return await self._remote.judge(sample, boxed=rm_type.startswith(BOXED_PREFIX))
        [verdict] = await self._call((rm_type, sample), 1)
        return verdict

    async def judge_group(self, samples: Sequence[Sample]) -> None:
        """Judge those of a group that are finished and have no reward yet, in one call, and write the verdicts.

        Raises:
            ValueError: rewards are not computed by group (`by_group`).
        """
        if not self.by_group:
            raise ValueError("--group-rm, --custom-rm-path: not both given; judge takes one sample at a time")
        finished = (Status.COMPLETED, Status.TRUNCATED)
        unjudged = [sample for sample in samples if sample.status in finished and sample.reward is None]
        if unjudged:
            verdicts = await self._call((None, unjudged), len(unjudged))
            for sample, verdict in zip(unjudged, verdicts, strict=True):
                verdict.apply(sample)

    async def _call(self, what: tuple[str | None, Sample | list[Sample]], count: int) -> list[Verdict]:
        """Call the reward function once in a worker, and return its `count` verdicts."""
        try:
            payload = pickle.dumps(what)
        except Exception as error:  # noqa: BLE001 (metadata may hold anything; if it cannot be sent, its task fails)
            return [error_verdict(error)] * count
        loop = self._open()
        task = Task(next(self._numbers), payload, loop.create_future())
        self._waiting.append(task)
        self._hand_out()
        try:
            verdicts = await task.done
        finally:
            if task.done.cancelled():
                self._call_off(task)
        verdicts = [verdict.masked(self._mask) for verdict in verdicts]
        return verdicts * count if len(verdicts) < count else verdicts

    def _open(self) -> asyncio.AbstractEventLoop:
        """Return the caller's event loop; the first call starts the workers."""
        if self._closed:
            raise RuntimeError("the reward workers are closed")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            for _ in range(self._args.rm_num_workers):
                self._add_worker()
        if self._broken is not None:
            raise self._broken
        if self._loop is not loop:
            raise RuntimeError("the reward workers belong to the event loop in which the first sample was judged")
        return loop

    # ---- tasks to workers

    def _hand_out(self) -> None:
        """Give waiting tasks to workers with room, in order, and end retired workers without tasks."""
        for worker in [worker for worker in self._workers if worker.retired and not worker.tasks]:
            self._end(worker)
        while self._waiting:
            worker = self._worker_for(self._waiting[0])
            if worker is None:
                break
            worker.send(self._waiting.popleft())
        if self._watch is None and any(worker.tasks for worker in self._workers):
            self._look_later()

    def _worker_for(self, task: Task) -> RewardProcess | None:
        """Return the worker with the fewest tasks if it has room, else None."""
        free = [worker for worker in self._workers if worker.ready and not worker.retired and not worker.runs_alone]
        worker = min(free, key=lambda worker: len(worker.tasks), default=None)
        room = 1 if task.alone else self._capacity
        return worker if worker is not None and len(worker.tasks) < room else None

    def _call_off(self, task: Task) -> None:
        if task in self._waiting:
            self._waiting.remove(task)
        for worker in self._workers:
            if task.number in worker.tasks and self._is_async:
                del worker.tasks[task.number]
                worker.call_off(task.number)
        if not self._closed:
            self._hand_out()

    def _answered(self, worker: RewardProcess, number: int, payload: bytes) -> None:
        if number == START:
            worker.started(int(payload))
        elif (task := worker.tasks.pop(number, None)) is not None:
            _settle(task, [Verdict(*entry) for entry in orjson.loads(payload)])
        self._hand_out()

    # ---- workers that hang or die

    def _look_later(self) -> None:
        assert self._loop is not None, "_open comes first"
        self._clock.tick()
        self._watch = self._loop.call_later(self._interval, self._look)

    @property
    def _interval(self) -> float:
        """Seconds between two checks of the workers."""
        return min(0.25, self._args.rm_timeout / 10)

    def _look(self) -> None:
        """Check the workers; time in which this loop itself was blocked counts against none of them."""
        assert self._loop is not None, "_open comes first"
        self._watch = None
        seconds = self._clock.tick()
        for worker in [worker for worker in self._workers if worker.tasks]:
            worker.look(seconds)
            if worker.has_died:
                self._lost(worker, CRASH)
            elif worker.silence > self._args.rm_timeout:
                self._lost(worker, TIMEOUT)
        for worker in [worker for worker in self._workers if worker.ready]:
            self._look_at_memory(worker)
        self._hand_out()  # schedules the next check if anything is in flight

    def _look_at_memory(self, worker: RewardProcess) -> None:
        """Replace a worker that has grown: a leak grows with every call, so no single call is at fault."""
        limit, grown = self._args.rm_worker_memory * 1e9, worker.grown
        if grown > 2 * limit and worker.tasks:
            self._lost(worker, MEMORY)
        elif grown > limit and not worker.retired:
            logger.warning(
                "a reward worker has grown by %.2f GB and is replaced (--rm-worker-memory %g): does the reward leak?",
                grown / 1e9, self._args.rm_worker_memory,
            )  # fmt: skip
            worker.retired = True
            self._add_worker()

    def _end(self, worker: RewardProcess) -> None:
        self._workers.discard(worker)
        worker.kill()
        assert self._loop is not None, "_open comes first"
        self._loop.run_in_executor(None, worker.process.wait)  # freeing gigabytes may take a while

    def _lost(self, worker: RewardProcess, failure: str = CRASH) -> None:
        """Handle a worker that died or hangs: fail the task at fault, hand out the others again, replace the worker."""
        if self._closed or not worker.ready:
            self._workers.discard(worker)
            worker.kill()
            if not self._closed:
                worker.process.wait()
                self._break(f"exit code {worker.process.returncode}; its message is above")
            return
        self._end(worker)
        tasks = [task for task in worker.tasks.values() if not task.done.done()]
        culprit = tasks[0].number if worker.running == 0 and len(tasks) == 1 else worker.running
        innocent = [task for task in tasks if task.number != culprit]
        for task in tasks:
            if task.number == culprit:
                _settle(task, [Verdict(None, failure)])
        if culprit:
            self._waiting.extendleft(reversed(innocent))
        else:
            for task in innocent:
                task.alone = True
            self._waiting.extend(innocent)
        if not worker.retired:  # a retired worker has been replaced before
            self._add_worker()
        self._hand_out()

    def _break(self, message: str) -> None:
        self._broken = RuntimeError(f"a reward worker did not start ({message})")
        self._fail_all(self._broken)

    def _fail_all(self, error: RuntimeError) -> None:
        """Fail all tasks, so that nobody waits for an answer that will never come."""
        tasks = [*self._waiting, *(task for worker in self._workers for task in worker.tasks.values())]
        self._waiting.clear()
        for task in tasks:
            if not task.done.done():
                task.done.set_exception(error)

    def _add_worker(self) -> None:
        """Start a worker; it is ready later."""
        try:
            worker = RewardProcess(self._args, self._answered, self._lost)
        except OSError as error:
            self._break(str(error))
            return
        self._workers.add(worker)
        assert self._loop is not None, "_open comes first"
        self._loop.call_later(_START_TIMEOUT, self._check_started, worker)
        connecting = self._loop.create_task(worker.connect())
        self._starting.add(connecting)
        connecting.add_done_callback(self._starting.discard)

    def _check_started(self, worker: RewardProcess) -> None:
        if worker in self._workers and not worker.ready:
            self._lost(worker)

    def close(self) -> None:
        """End the workers; their work is lost, and callers that wait for it get an error."""
        self._closed = True
        loop_goes_on = self._loop is not None and not self._loop.is_closed()
        if loop_goes_on:
            self._fail_all(RuntimeError("the reward workers are closed"))
            if self._watch is not None:
                self._watch.cancel()
        workers, self._workers = self._workers, set()
        for worker in workers:
            worker.kill() if loop_goes_on else worker.end()
        for worker in workers:
            worker.process.wait()


def _check_type(args: Args, rm_type: str | None) -> None:
    if needs_url(rm_type):
        if args.rm_url is None:
            raise ValueError(NO_URL)
    elif rm_type is not None:
        find_reward(rm_type)


def _remote_reward(args: Args) -> RemoteReward | None:
    if args.rm_url is None:
        return None
    from slime.rollout.rewards.remote import RemoteReward  # aiohttp, which workers do without

    return RemoteReward(args)


def _settle(task: Task, verdicts: list[Verdict]) -> None:
    if not task.done.done():
        task.done.set_result(verdicts)
