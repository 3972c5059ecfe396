"""Weights by files: trainer rank 0 writes an HF directory, and every engine is told to load it.

Path: after every training round the trainers stream their weights (a collective among them); rank 0 writes
`weights-v000012` into a directory that the engines can read, too, and asks each for /update_weights_from_disk. No
process group is joined: for engines on other machines, the shared file system is all that is needed. Invariants: a
version's directory is whole before it has its name; at most two versions are there at once; what is not loaded by
every engine ends the run.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from slime.engine.client import EngineClient, EngineError
from slime.models.hf_files import write_hf
from slime.sync.stream import NamedTensor
from slime.sync.transport import SyncReport, Transport

LOCK = ".slime-weights.lock"
PROOF = "weights-proof"
"""Where the export that a sync is compared with stands."""
_OWN = re.compile(r"(\.tmp_(old_)?)?weights-(v\d{6,}|proof)")


class WeightDirectory:
    """A directory for weights on their way, held by one run: emptied of its own files when it starts and ends."""

    def __init__(self, path: Path) -> None:
        """Make it, hold it, and remove what a killed run left.

        Raises:
            ValueError: another run holds it.
        """
        path.mkdir(parents=True, exist_ok=True)
        self.path = path.absolute()
        self._lock = (self.path / LOCK).open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._lock.fileno()).st_nlink == 0:
                raise BlockingIOError  # its holder is just leaving, and has removed it
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            raise ValueError(
                f"--update-weight-disk-dir {path}: {holder} sends weights through it; one run's engines would load "
                "another's: give this one a directory of its own, or wait"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()
        remove_weights(self.path)

    def close(self) -> None:
        """Leave nothing there."""
        if self.path.is_dir():
            remove_weights(self.path)
            (self.path / LOCK).unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()
        self._lock.close()


def remove_weights(directory: Path, *, keep: Path | None = None) -> None:
    """Remove all versions in `directory`, whole or half-written, but `keep`; other files are left alone."""
    for entry in directory.iterdir():
        if entry != keep and _OWN.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)


class DiskTransport(Transport):
    """Writes into `directory`, with everything but the weights from `source_hf_dir`, in `dtype`."""

    def __init__(
        self, client: EngineClient, *, directory: Path, source_hf_dir: str | Path, dtype: torch.dtype, bucket_bytes: int
    ) -> None:
        super().__init__(client, bucket_bytes=bucket_bytes)
        self._directory = directory.absolute()
        self._source = source_hf_dir
        self._dtype = dtype

    def send(self, tensors: Iterable[NamedTensor], *, version: int) -> SyncReport:
        total = 0

        def counted() -> Iterator[NamedTensor]:
            nonlocal total
            for name, tensor in tensors:
                total += tensor.numel() * self._dtype.itemsize
                yield name, tensor

        path = self._directory / f"weights-v{version:06d}"
        start = time.perf_counter()
        write_hf(path, counted(), self._source, self._dtype, max_shard_bytes=self._bucket_bytes)
        written = time.perf_counter()
        try:
            self._runner.run(self._client.update_weights_from_disk(str(path), weight_version=str(version)))
        except EngineError as error:
            raise RuntimeError(
                f"{error.url} did not load policy version {version} from {path}: {error.message}"
            ) from error
        end = time.perf_counter()
        remove_weights(self._directory, keep=path)
        return SyncReport(seconds=end - start, bytes=total, parts={"write": written - start, "load": end - written})
