"""RewardPool: rewards outside the event loop, in processes that can be killed.

Path: `collect` and `evaluate` hand finished samples in and get Verdicts. Invariant: whatever a reward function does
(hang, crash, raise, return nonsense), it costs its own sample only, and that is said in the verdict.

A worker is a fresh interpreter that loads the reward function and nothing else. (multiprocessing's and pebble's pools
import the parent's main module again in each worker, which inside Ray means Ray.)
"""

from __future__ import annotations

import asyncio
import inspect
import multiprocessing
import os
import queue
import subprocess
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import orjson

from slime.config.args import Args
from slime.config.eval_data import eval_datasets
from slime.core.plugins import load_hook
from slime.core.sample import Sample
from slime.rollout.rm_hub.registry import find_reward
from slime.rollout.rm_hub.verdict import CRASH, TIMEOUT, Verdict, error_verdict, verdict_of

AsyncReward = Callable[[Args, Sample], Awaitable[object]]

_START_TIMEOUT = 120.0
"""Seconds for a worker to load the reward function; not counted against any sample."""


class _Worker:
    """One worker process and the connection to it."""

    def __init__(self, args: Args) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        search_path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "slime.rollout.rm_hub.worker", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONPATH": search_path},
            )
        finally:
            theirs.close()
        self._ready = False
        self._connection.send(args)

    def wait_ready(self) -> None:
        """Raises RuntimeError where the worker cannot start: then no reward can ever be computed."""
        if self._ready:
            return
        try:
            self._ready = self._connection.poll(_START_TIMEOUT) and self._connection.recv_bytes() == b"ready"
        except (EOFError, OSError):
            self._ready = False
        if not self._ready:
            self.kill()
            raise RuntimeError(
                f"a reward worker did not start (exit code {self._process.returncode}); its message stands above"
            )

    def call(self, task: tuple[str | None, Sample], timeout: float) -> Verdict | None:
        """The verdict; None where the time is over.

        Raises:
            EOFError, OSError: the worker died.
        """
        self._connection.send(task)
        if not self._connection.poll(timeout):
            return None
        return Verdict(*orjson.loads(self._connection.recv_bytes()))

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()


class RewardPool:
    """`--rm-num-workers` processes for plain reward functions; async ones run in the event loop.

    Raises:
        ValueError: no such --rm-type, or --custom-rm-path cannot be loaded.
    """

    def __init__(self, args: Args) -> None:
        self._args = args
        self._async_function: AsyncReward | None = None
        self._closed = False
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: set[_Worker] = set()
        named = [args.rm_type, *(dataset.rm_type for dataset in eval_datasets(args))]
        types = {rm_type for rm_type in named if rm_type is not None}
        for rm_type in types:
            find_reward(rm_type)
        self._num_workers = args.rm_num_workers if types else 0
        if args.custom_rm_path is not None:
            function = load_hook("custom_rm_path", args.custom_rm_path)
            if inspect.iscoroutinefunction(function):
                self._async_function = function
            self._num_workers = 0 if self._async_function is not None else args.rm_num_workers
        self._threads = ThreadPoolExecutor(max(1, self._num_workers), thread_name_prefix="reward")
        # The kernel ties a worker's life to the thread that started it, so the pool's threads start them.
        for future in [self._threads.submit(self._start_worker) for _ in range(self._num_workers)]:
            future.result()

    async def judge(self, sample: Sample, *, rm_type: str | None = None) -> Verdict:
        """The reward of one sample. `rm_type` stands in for --rm-type; the sample's metadata goes before both.

        Raises:
            ValueError: no reward is named for it.
        """
        if self._async_function is not None:
            return await self._judge_async(self._async_function, sample)
        if self._args.custom_rm_path is None:
            rm_type = sample.metadata.get("rm_type", rm_type or self._args.rm_type)
        if self._num_workers == 0 or (rm_type is None and self._args.custom_rm_path is None):
            raise ValueError("--rm-type: not given, and neither is --custom-rm-path; responses need one to be judged")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._judge_in_worker, sample, rm_type)

    async def _judge_async(self, function: AsyncReward, sample: Sample) -> Verdict:
        try:
            return verdict_of(await asyncio.wait_for(function(self._args, sample), self._args.rm_timeout))
        except TimeoutError:
            return Verdict(None, TIMEOUT)
        except Exception as error:  # noqa: BLE001 (a reward function may raise anything; it costs its sample only)
            return error_verdict(error)

    def _judge_in_worker(self, sample: Sample, rm_type: str | None) -> Verdict:
        """Runs in one of the pool's threads; there are as many of them as workers."""
        if self._closed:
            raise RuntimeError("the reward workers are closed")
        worker = self._idle.get()
        try:
            worker.wait_ready()
            verdict = worker.call((rm_type, sample), self._args.rm_timeout)
            failure = TIMEOUT
        except RuntimeError:
            self._idle.put(worker)  # so that no other thread waits for a worker in vain: it fails there as well
            raise
        except (EOFError, OSError):
            verdict = None
            failure = CRASH
        if verdict is not None:
            self._idle.put(worker)
            return verdict
        worker.kill()
        self._workers.discard(worker)
        self._start_worker()
        return Verdict(None, failure)

    def _start_worker(self) -> None:
        if self._closed:
            return
        worker = _Worker(self._args)
        self._workers.add(worker)
        self._idle.put(worker)

    def close(self) -> None:
        """End the workers; whatever they are doing is lost."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(self._workers):
            worker.kill()
