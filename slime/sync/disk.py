"""Weights by files: trainer rank 0 writes an HF directory, and every engine loads it.

- Where it sits: after every training round the trainers stream their weights, which is a collective among them. Rank 0
  writes `weights-v000012` into a directory that the engines can read, too, and posts /update_weights_from_disk to each.
  There is no process group: engines on other machines need only a shared file system.
- Invariant: a version's directory is complete before it gets its name. At most two versions exist at once. The run ends
  with an error if an engine did not load a version.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from slime.core.pausing import PauseChoice
from slime.engine.bucket_layout import NamedTensor
from slime.engine.client import EngineClient, EngineError
from slime.models.hf_files import write_hf
from slime.sync.transport import DRAIN_WITHIN_S, Opening, SyncReport, Transport
from slime.sync.weight_directory import remove_weights


class DiskTransport(Transport):
    """Writes weights in `dtype` into `directory`; everything else is copied from `source_hf_dir`."""

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

    @classmethod
    def open(cls, opening: Opening) -> DiskTransport:
        """Open it on trainer 0; the engines load what it writes into the run's weight directory."""
        args = opening.args
        return cls(
            opening.client(),
            directory=Path(args.resolved.update_weight_disk_dir),
            source_hf_dir=args.resolved.hf_checkpoint,
            dtype=opening.dtype,
            bucket_bytes=args.update_weight_buffer_size,
            pause=args.update_weight_pause,
            drain_within=args.engine_request_timeout,
        )

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
