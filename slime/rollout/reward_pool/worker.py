"""One reward process, `python -m slime.rollout.reward_pool.worker SOCKET PAGE`, started and killed by `process`.

- Where it sits: a task comes in, the reward function runs, and a JSON answer goes back. A plain function judges one
  task after another; an async one has many in flight (see `async_worker`).
- Invariant: the process holds nothing that would have to be saved, so its guard may end it at any time.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import pickle
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any, BinaryIO, cast

import orjson

from slime.config.args import Args
from slime.config.secrets import masker_of
from slime.core.about import about, label_output
from slime.core.failure_log import FailureLog
from slime.core.masking import mask_output
from slime.core.plugins import load_hook
from slime.core.sample import Sample
from slime.observability.logs import FORMAT
from slime.observability.output_log import MARK
from slime.rollout.reward_pool.async_worker import serve_together
from slime.rollout.reward_pool.channel import HEADER, START, Page, pack
from slime.rollout.reward_pool.verdict import TIMEOUT, Verdict, error_verdict, verdict_of, verdicts_of
from slime.rollout.rewards.reward import find_reward, is_async, load_rewards

LOGGED = "logged"
"""The third argument of a worker whose output goes to an OutputLog."""
_BUILT_IN_MEMORY = 4 * 1024**3
"""Bytes of address space for the built-in rewards: an answer such as 10^{10^{10}} must not fill the machine."""


class Judge:
    """Holds the reward function, and turns tasks into calls of it."""

    def __init__(self, args: Args, *, marks: bool) -> None:
        """`marks`: our output goes to an OutputLog, which reads marks."""
        self._args = args
        self._marks = marks
        self._failures = FailureLog(logging.getLogger(__name__))
        paths = args.reward_paths
        self._custom = load_hook("custom_rm_path", *paths) if paths else None
        self.is_async = self._custom is not None and is_async(self._custom)

    def judge(self, payload: bytes, runner: asyncio.Runner) -> list[Verdict]:
        """Return a verdict for each sample, or one failure for all. A plain function may return a coroutine."""
        what: Any = None
        try:
            rm_type, what = pickle.loads(payload)
            if self._marks:
                os.write(2, MARK + _name(what).encode() + b"\n")
            value = self._call(rm_type, what)
            return self._verdicts(what, runner.run(value) if inspect.iscoroutine(value) else value)
        except Exception as error:  # noqa: BLE001 (a reward function may raise anything; that costs only its task)
            self._failures.add("the reward", error)
            return [error_verdict(error)]

    async def judge_async(self, payload: bytes) -> bytes:
        """Judge with an async function, in a loop with other tasks in flight; return the encoded verdicts."""
        what: Any = None
        try:
            rm_type, what = pickle.loads(payload)
            with about(_name(what)):
                return encode(self._verdicts(what, await self._call(rm_type, what)))
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 (as above)
            with about(_name(what)):
                self._failures.add("the reward", error)
            return encode([error_verdict(error)])

    def _call(self, rm_type: str | None, what: Any) -> Any:
        if self._custom is not None:
            return self._custom(self._args, what)
        assert rm_type is not None, "the pool requires one"
        return find_reward(rm_type)(self._args, what)

    def _verdicts(self, what: Sample | list[Sample], value: object) -> list[Verdict]:
        key = self._args.reward_key
        return verdicts_of(value, len(what), key) if isinstance(what, list) else [verdict_of(value, key)]


def _name(what: Sample | list[Sample] | None) -> str:
    """Return how output names what is judged."""
    match what:
        case Sample():
            return f"sample {what.index}"
        case list():
            return f"group {what[0].group_index}"
        case None:
            return "a sample that cannot be read"


def encode(verdicts: Sequence[Verdict]) -> bytes:
    return orjson.dumps([[verdict.reward, verdict.failure, verdict.code_verdict] for verdict in verdicts])


def serve_in_turn(connection: socket.socket, page: Page, judge: Judge) -> None:
    """Serve one task after another, outside any event loop."""
    stream = connection.makefile("rb")
    with asyncio.Runner() as runner:
        while len(header := stream.read(HEADER.size)) == HEADER.size:
            number, length = HEADER.unpack(header)
            payload = stream.read(length)
            if not payload:
                continue  # the task was cancelled, but it is done already
            page.enter(number)
            verdicts = judge.judge(payload, runner)
            page.leave()
            connection.sendall(pack(number, encode(verdicts)))


def _read(stream: BinaryIO, length: int) -> bytes:
    """Read exactly `length` bytes, from a stream without a buffer of its own."""
    parts = bytearray()
    while len(parts) < length:
        part = stream.read(length - len(parts))
        if not part:
            sys.exit("the owner of this reward worker is gone")
        parts += part
    return bytes(parts)


def _handler() -> logging.Handler:
    """Return a handler for what reward functions log: it goes where their prints go."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT, defaults={"about": ""}))  # the stream adds it
    return handler


def _limit_memory() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _BUILT_IN_MEMORY if hard == resource.RLIM_INFINITY else min(_BUILT_IN_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    page = Page(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the owner ends this process
    with cast(BinaryIO, connection.makefile("rb", buffering=0)) as stream:
        _, length = HEADER.unpack(_read(stream, HEADER.size))
        args: Args = pickle.loads(_read(stream, length))
    label_output()
    mask_output(masker_of(args))
    logging.basicConfig(level=logging.INFO, handlers=[_handler()])
    judge = Judge(args, marks=sys.argv[3:] == [LOGGED])
    if args.custom_rm_path is None:
        # Imported only here: a worker with a function of its own starts in less time without it.
        from slime.rollout.rewards import mathematics

        load_rewards()
        mathematics.warm_up()
        _limit_memory()
    connection.sendall(pack(START, str(os.getpid()).encode()))
    if judge.is_async:
        late = encode([Verdict(None, TIMEOUT)])
        asyncio.run(serve_together(connection, page, judge.judge_async, late, args.rm_timeout))
    else:
        serve_in_turn(connection, page, judge)


if __name__ == "__main__":
    main()
