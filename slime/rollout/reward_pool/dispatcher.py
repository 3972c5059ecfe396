"""Dispatcher: hands tasks to the worker processes of a RewardPool, and finds the task at fault if one is lost.

- Called by: `pool`, which makes it for its first sample.
- Invariant: every task gets an answer, also if its worker hangs, dies or cannot start.

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
from collections import deque
from pathlib import Path

import orjson

from slime.config.args import Args
from slime.core.awake import AwakeClock
from slime.rollout.reward_pool.channel import START
from slime.rollout.reward_pool.process import RewardProcess, Task, start_process
from slime.rollout.reward_pool.verdict import CRASH, MEMORY, TIMEOUT, Verdict

logger = logging.getLogger(__name__)

_START_TIMEOUT = 120.0
"""Seconds for a worker to load the reward function; they do not count against any sample."""


class Dispatcher:
    """Holds the tasks of one event loop and `--rm-num-workers` processes, which it starts at once.

    `is_async` is whether the reward function is async, so that a worker can have several tasks in flight. `log_name` is
    the beginning of the names of the workers' log files.
    """

    def __init__(
        self,
        args: Args,
        loop: asyncio.AbstractEventLoop,
        *,
        is_async: bool,
        log_dir: Path | None = None,
        log_name: str = "reward",
    ) -> None:
        self._log_dir, self._log_name = log_dir, log_name
        self._places: set[int] = set()
        """The numbers of the log files that are in use."""
        self.workers: set[RewardProcess] = set()
        self._args, self._loop, self._is_async = args, loop, is_async
        self._capacity = math.ceil(args.rm_concurrency / args.rm_num_workers) if is_async else 1
        """The number of tasks in flight at once in each worker."""
        self._numbers = itertools.count(START + 1)
        self._waiting: deque[Task] = deque()
        self._starting: set[asyncio.Task[None]] = set()
        self._closed = False
        self._broken: RuntimeError | None = None
        """Set if a worker could not start, so that no reward can ever be computed."""
        self._watch: asyncio.TimerHandle | None = None
        self._clock = AwakeClock(self._interval)
        for _ in range(args.rm_num_workers):
            self._add_worker()

    def check(self, loop: asyncio.AbstractEventLoop) -> None:
        """Raise a RuntimeError if the caller's `loop` cannot use the workers, or if they do not start."""
        if self._broken is not None:
            raise self._broken
        if self._loop is not loop:
            raise RuntimeError("the reward workers belong to the event loop in which the first sample was judged")

    async def judge(self, payload: bytes) -> list[Verdict]:
        """Call the reward function once in a worker; return a verdict for each sample, or one failure for all.

        Raises:
            RuntimeError: the workers do not start, or are closed.
        """
        task = Task(next(self._numbers), payload, self._loop.create_future())
        self._waiting.append(task)
        self._hand_out()
        try:
            return await task.done
        finally:
            if task.done.cancelled():
                self._call_off(task)

    # ---- tasks to workers

    def _hand_out(self) -> None:
        """Give waiting tasks to workers with room, in order, and end retired workers without tasks."""
        for worker in [worker for worker in self.workers if worker.retired and not worker.tasks]:
            self._end(worker)
        while self._waiting:
            worker = self._worker_for(self._waiting[0])
            if worker is None:
                break
            worker.send(self._waiting.popleft())
        if self._watch is None and any(worker.tasks for worker in self.workers):
            self._look_later()

    def _worker_for(self, task: Task) -> RewardProcess | None:
        """Return the worker with the fewest tasks if it has room, else None."""
        free = [worker for worker in self.workers if worker.ready and not worker.retired and not worker.runs_alone]
        worker = min(free, key=lambda worker: len(worker.tasks), default=None)
        room = 1 if task.alone else self._capacity
        return worker if worker is not None and len(worker.tasks) < room else None

    def _call_off(self, task: Task) -> None:
        if task in self._waiting:
            self._waiting.remove(task)
        for worker in self.workers:
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
        self._clock.tick()
        self._watch = self._loop.call_later(self._interval, self._look)

    @property
    def _interval(self) -> float:
        """Seconds between two checks of the workers."""
        return min(0.25, self._args.rm_timeout / 10)

    def _look(self) -> None:
        """Check the workers; time in which this loop itself was blocked counts against none of them."""
        self._watch = None
        seconds = self._clock.tick()
        for worker in [worker for worker in self.workers if worker.tasks]:
            worker.look(seconds)
            if worker.has_died:
                self._lost(worker, CRASH)
            elif worker.silence > self._args.rm_timeout:
                self._lost(worker, TIMEOUT)
        for worker in [worker for worker in self.workers if worker.ready]:
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
        self.workers.discard(worker)
        self._places.discard(worker.place)
        worker.kill()
        self._loop.run_in_executor(None, worker.wait)  # freeing gigabytes may take a while

    def _lost(self, worker: RewardProcess, failure: str = CRASH) -> None:
        """Handle a worker that died or hangs: fail the task at fault, hand out the others again, replace the worker."""
        if self._closed or not worker.ready:
            self.workers.discard(worker)
            worker.kill()
            if not self._closed:
                worker.wait()
                self._break(f"exit code {worker.process.returncode}; {self._message_place(worker)}")
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

    def _message_place(self, worker: RewardProcess) -> str:
        """Return where the last words of a worker are that did not start."""
        if self._log_dir is None:
            return "its message is above"
        path = self._log_dir / f"{self._log_name}-{worker.place}.log"
        last = path.read_text(errors="replace").strip().rpartition("\n")[2][:500] if path.exists() else ""
        return f"{last}; the log is {path}" if last else f"its log is {path}"

    def _break(self, message: str) -> None:
        self._broken = RuntimeError(f"a reward worker did not start ({message})")
        self._fail_all(self._broken)

    def _fail_all(self, error: RuntimeError) -> None:
        """Fail all tasks, so that nobody waits for an answer that will never come."""
        tasks = [*self._waiting, *(task for worker in self.workers for task in worker.tasks.values())]
        self._waiting.clear()
        for task in tasks:
            if not task.done.done():
                task.done.set_exception(error)

    def _add_worker(self) -> None:
        """Begin to start a worker; it is ready later."""
        starting = self._loop.create_task(self._start_worker())
        self._starting.add(starting)
        starting.add_done_callback(self._starting.discard)

    async def _start_worker(self) -> None:
        try:
            place = next(number for number in itertools.count() if number not in self._places)
            self._places.add(place)
            log = None if self._log_dir is None else self._log_dir / f"{self._log_name}-{place}.log"
            worker = await start_process(self._args, self._answered, self._lost, place=place, log=log)
        except Exception as error:  # noqa: BLE001 (whatever it is, callers get it instead of waiting for ever)
            self._break(str(error))
            return
        self.workers.add(worker)
        self._loop.call_later(_START_TIMEOUT, self._check_started, worker)

    def _check_started(self, worker: RewardProcess) -> None:
        if worker in self.workers and not worker.ready:
            self._lost(worker)

    def close(self) -> None:
        """End the workers; their work is lost, and callers that wait for it get an error."""
        self._closed = True
        loop_goes_on = not self._loop.is_closed()
        if loop_goes_on:
            self._fail_all(RuntimeError("the reward workers are closed"))
            for starting in self._starting:
                starting.cancel()
            if self._watch is not None:
                self._watch.cancel()
        workers, self.workers = self.workers, set()
        for worker in workers:
            worker.kill() if loop_goes_on else worker.end()
        for worker in workers:
            worker.wait()


def _settle(task: Task, verdicts: list[Verdict]) -> None:
    if not task.done.done():
        task.done.set_result(verdicts)
