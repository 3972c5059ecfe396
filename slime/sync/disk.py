"""Weights by files: trainer rank 0 writes an HF directory, and every engine is told to load it.

Path: after every training round the trainers stream their weights (a collective among them); rank 0 writes
`weights-v000012` into a directory that the engines can read, too, and asks each for /update_weights_from_disk. No
process group is joined: for engines on other machines, the shared file system is all that is needed. Invariants: a
version's directory is whole before it has its name; at most two versions are there at once; what is not loaded by
every engine ends the run.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from slime.engine.client import EngineClient, EngineError
from slime.models.hf_files import write_hf
from slime.sync.stream import NamedTensor
from slime.sync.transport import DRAIN_WITHIN_S, PauseChoice, SyncReport, Transport
from slime.sync.weight_directory import remove_weights


class DiskTransport(Transport):
    """Writes into `directory`, with everything but the weights from `source_hf_dir`, in `dtype`."""

    engines_generate = True

    def __init__(
        self,
        client: EngineClient,
        *,
        directory: Path,
        source_hf_dir: str | Path,
        dtype: torch.dtype,
        bucket_bytes: int,
        pause: PauseChoice = "drain",
        drain_within: float = DRAIN_WITHIN_S,
    ) -> None:
        super().__init__(client, bucket_bytes=bucket_bytes, pause=pause, drain_within=drain_within)
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
            with self.paused() as waited:
                paused = time.perf_counter()
                self._runner.run(self._client.update_weights_from_disk(str(path), weight_version=str(version)))
        except EngineError as error:
            raise RuntimeError(
                f"{error.url} did not load policy version {version} from {path}: {error.message}"
            ) from error
        write, load = written - start, time.perf_counter() - paused
        remove_weights(self._directory, keep=path)
        return SyncReport(seconds=write + load, bytes=total, parts={"write": write, "load": load}, waited=waited)
