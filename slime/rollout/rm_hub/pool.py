"""RewardPool: rewards outside the event loop, in processes that can be killed.

Path: `collect` and `evaluate` hand finished samples in and get Verdicts. Invariant: whatever a reward function does
(hang, crash, raise, return nonsense), it costs its own sample only, and that is said in the verdict.

A worker is a fresh interpreter that loads the reward function and nothing else. (multiprocessing's and pebble's pools
import the parent's main module again in each worker, which inside Ray means Ray.)
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import queue
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import orjson

from slime.config.args import Args
from slime.config.eval_data import eval_datasets
from slime.core.plugins import load_hook
from slime.core.sample import Sample
from slime.rollout.rm_hub.registry import find_reward, reward_type
from slime.rollout.rm_hub.verdict import CRASH, TIMEOUT, Verdict

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
        """From any thread, any number of times.

        The connection closes with the last reference to the worker: not here, where another thread may wait on it.
        """
        self._process.kill()
        self._process.wait()


class RewardPool:
    """`--rm-num-workers` processes, started when the first sample is judged: a run that judges none has none.

    Raises:
        ValueError: no such --rm-type, or --custom-rm-path cannot be loaded.
    """

    def __init__(self, args: Args) -> None:
        self._args = args
        self._lock = threading.Lock()
        """Held while workers are started, and to close."""
        self._started = False
        self._closed = False
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: set[_Worker] = set()
        if args.custom_rm_path is not None:
            load_hook("custom_rm_path", args.custom_rm_path)
        else:
            for rm_type in (args.rm_type, *(dataset.rm_type for dataset in eval_datasets(args))):
                if rm_type is not None:
                    find_reward(rm_type)
        self._threads = ThreadPoolExecutor(args.rm_num_workers, thread_name_prefix="reward")

    async def judge(self, sample: Sample, *, rm_type: str | None = None) -> Verdict:
        """The reward of one sample. `rm_type` stands in for --rm-type; the sample's metadata goes before both.

        Raises:
            ValueError: no reward is named for it.
        """
        rm_type = reward_type(self._args, sample, rm_type)
        if rm_type is None and self._args.custom_rm_path is None:
            raise ValueError(
                "--rm-type: not given, and neither is --custom-rm-path nor the data line's metadata.rm_type; "
                "responses need one to be judged"
            )
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._judge_in_worker, sample, rm_type)

    def _judge_in_worker(self, sample: Sample, rm_type: str | None) -> Verdict:
        """Runs in one of the pool's threads; there are as many of them as workers."""
        self._start_workers()
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
        self._replace(worker)
        return Verdict(None, failure)

    def _start_workers(self) -> None:
        """All of them, at the first call. The kernel ends a worker with the thread that started it, hence here."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the reward workers are closed")
            if not self._started:
                for _ in range(self._args.rm_num_workers):
                    self._add_worker()
                self._started = True

    def _replace(self, worker: _Worker) -> None:
        with self._lock:
            self._workers.discard(worker)
            if not self._closed:
                self._add_worker()

    def _add_worker(self) -> None:
        worker = _Worker(self._args)
        self._workers.add(worker)
        self._idle.put(worker)

    def close(self) -> None:
        """End the workers; whatever they are doing is lost."""
        with self._lock:
            self._closed = True
            workers, self._workers = self._workers, set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
