"""One reward process: `python -m slime.rollout.rm_hub.worker FD`, started and killed by `pool`.

Path: a task comes in over the connection FD, the reward function runs, one JSON answer goes back. Invariant: the
process ends with its owner, also when a reward function hangs and the owner was killed.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import inspect
import logging
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection

import orjson

from slime.config.args import Args
from slime.core.plugins import load_hook
from slime.core.sample import Sample
from slime.rollout.rm_hub import deepscaler
from slime.rollout.rm_hub.registry import Reward, find_reward
from slime.rollout.rm_hub.verdict import Verdict, error_verdict, verdict_of

_PR_SET_PDEATHSIG = 1
_BUILT_IN_MEMORY = 4 * 1024**3
"""Bytes of address space for the built-in rewards: an answer such as 10^{10^{10}} must not fill the machine."""


def die_with_parent(parent: int) -> None:
    """Linux kills this process when the thread that started it ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def judge(args: Args, reward: Reward, sample: Sample, runner: asyncio.Runner) -> Verdict:
    """What `reward` makes of the sample. An async one runs in `runner`'s loop, the same for every sample."""
    try:
        value = reward(args, sample)
        return verdict_of(runner.run(value) if inspect.iscoroutine(value) else value)
    except Exception as error:  # noqa: BLE001 (a reward function may raise anything; it costs its sample only)
        return error_verdict(error)


def _built_in(rm_type: str, args: Args, sample: Sample) -> object:
    return find_reward(rm_type)(args, sample)


def _limit_memory() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _BUILT_IN_MEMORY if hard == resource.RLIM_INFINITY else min(_BUILT_IN_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    die_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal; the owner ends us
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    args: Args = connection.recv()
    custom = None if args.custom_rm_path is None else load_hook("custom_rm_path", args.custom_rm_path)
    if custom is None:
        deepscaler.warm_up()
        _limit_memory()
    connection.send_bytes(b"ready")
    with asyncio.Runner() as runner:
        while True:
            try:
                rm_type, sample = connection.recv()
            except EOFError:
                return
            verdict = judge(args, custom or functools.partial(_built_in, rm_type), sample, runner)
            connection.send_bytes(orjson.dumps([verdict.reward, verdict.failure]))


if __name__ == "__main__":
    main()
