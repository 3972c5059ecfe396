"""Processes for tests that need several ranks. They live from test to test, and importing megatron takes seconds.

They are forked from one process that has imported it, so that it is imported once for all of them.

`workers.run(2, function, *args)` calls `function(rank, world_size, init_method, *args)` in two processes and returns
both results. `function` is at the top level of a test module, and joins and leaves its process groups itself:
`with joined(args, rank, world_size, init_method) as topology: ...`.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Any


@contextmanager
def joined(args: Any, rank: int, world_size: int, init_method: str) -> Iterator[Any]:
    """Join the process groups that `args` requires for the block; yield the Topology."""
    from slime.megatron.parallel import close_parallel, init_parallel

    try:
        yield init_parallel(args, rank=rank, world_size=world_size, init_method=init_method)
    finally:
        close_parallel()


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, function(*arguments)))
        except Exception:  # noqa: BLE001  whatever a test raises is its result
            connection.send((False, traceback.format_exc()))


class WorkerPool:
    """Processes that start when needed; all restart after a failure, which may have left one in a collective.

    With `own_imports` each process imports megatron itself: one that is forked after an import cannot use CUDA.
    """

    def __init__(self, *, own_imports: bool = False) -> None:
        self._workers: list[tuple[Any, Connection]] = []
        self._context = multiprocessing.get_context("spawn" if own_imports else "forkserver")
        self._context.set_forkserver_preload(["slime.megatron.trainer"])

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        while len(self._workers) < world_size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        with tempfile.TemporaryDirectory() as folder:
            init_method = f"file://{Path(folder) / 'rendezvous'}"
            connections = [connection for _, connection in self._workers[:world_size]]
            for rank, connection in enumerate(connections):
                connection.send((function, (rank, world_size, init_method, *args)))
            return self._collect(connections, timeout)

    def _collect(self, connections: list[Connection], timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = monotonic() + timeout
        while len(results) < len(connections):
            pending = [connection for rank, connection in enumerate(connections) if rank not in results]
            ready = wait(pending, max(deadline - monotonic(), 0))
            if not ready:
                missing = [rank for rank in range(len(connections)) if rank not in results]
                self.close()
                raise TimeoutError(f"ranks {missing} did not finish within {timeout:.0f} s")
            for connection in ready:
                rank = connections.index(connection)
                try:
                    worked, result = connection.recv()
                except EOFError:
                    worked, result = False, "the process died"
                if not worked:
                    self.close()
                    raise AssertionError(f"rank {rank}: {result}")
                results[rank] = result
        return [results[rank] for rank in range(len(connections))]

    def close(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.terminate()
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._workers = []
