"""WeightSender: one trainer's side of all weight syncs of a run.

- Used by: the rank of training holds one, connects it to the engines, and calls `send` after every rollout.
- Invariant: whatever happens, this trainer runs through the whole stream of tensors, because gathering each of them is
  collective. The first set that is sent after connecting is proven to have arrived (see `proof`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from slime.config.args import Args
from slime.core.weight_parts import WeightPart
from slime.engine.bucket_layout import NamedTensor
from slime.sync.finite import FiniteCheck, finite
from slime.sync.open import open_transport
from slime.sync.owners import OwnersTransport
from slime.sync.proof import check_versions, prove_weights
from slime.sync.transport import NullTransport, Opening, SyncReport, Transport, drain
from slime.sync.weight_directory import PROOF


class WeightSource(Protocol):
    """The trainer, as far as a weight sync needs it. All methods are collective."""

    @property
    def params_dtype(self) -> torch.dtype:
        """The dtype of what `iter_hf_tensors` yields."""
        ...

    def iter_hf_tensors(self) -> Iterator[NamedTensor]:
        """Yield the whole tensors by HF name, in the same order on every rank."""
        ...

    def weight_parts(self) -> Sequence[WeightPart]:
        """Return this rank's parts of the weights, in the order of their turns; called once a connection."""
        ...

    def save_hf(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the weights as an HF directory."""
        ...


class WeightSender:
    """Sends the actor's weights, checks them on the way, and proves that they arrived.

    Every method except `trained` is collective over the trainers.
    """

    def __init__(self, args: Args, source: WeightSource, *, rank: int, backend: str) -> None:
        """`backend` is torch.distributed's backend for the trainers' devices."""
        self._args = args
        self._source = source
        self._rank = rank
        self._backend = backend
        self._transport: Transport = NullTransport()
        self._parts: Sequence[WeightPart] = ()
        self._proven = False
        self._weights_from = ""
        self.version: int | None = None
        """The version under which the weights were last sent; None if they were never sent."""

    def trained(self, weights_from: str) -> None:
        """Record where the current weights come from, for errors: "loaded from ..." or "trained in ..."."""
        self._weights_from = weights_from

    def check(self) -> None:
        """Check that the weights are finite, without sending them. Raises RunError, naming those that are not."""
        drain(self._tensors())

    def connect(
        self,
        router_url: str,
        engine_urls: Sequence[str],
        engine_ranks: Sequence[int],
        shared_with: Sequence[Sequence[int]] = (),
    ) -> None:
        """Send to these engines from now on (see `Opening`).

        The previous transport is closed without a request to its engines, because some of them may be gone.
        """
        self._transport.leave()
        self._transport = NullTransport()  # also if the engines cannot be reached
        self._proven = False
        self._parts = self._source.weight_parts() if self._args.num_weight_owners > 1 else ()
        self._transport = open_transport(
            Opening(
                args=self._args,
                rank=self._rank,
                dtype=self._source.params_dtype,
                backend=self._backend,
                router_url=router_url,
                engine_urls=engine_urls,
                engine_ranks=engine_ranks,
                parts=self._parts,
                shared_with=shared_with,
            )
        )

    def send(self, version: int) -> dict[str, float]:
        """Send the weights to the engines as `version`; return the sync's metrics, empty if this trainer sent nothing.

        Raises:
            RunError: weights are not finite.
            RuntimeError: they did not arrive; the error names the engines.
        """
        self.version = version
        to_prove = self._args.check_weight_sync and not self._proven
        try:
            report = self._send(version)
            if self._transport.asks_engines:
                check_versions(self._transport, version=version)
        except RuntimeError:
            if to_prove:  # the proof is collective, and this trainer alone may know that the sync has failed
                _on_all(False)
            raise
        to_prove = to_prove and _on_all(True)
        if to_prove:
            self._prove(version)
            self._proven = True
        return report.metrics()

    def _send(self, version: int) -> SyncReport:
        if isinstance(self._transport, OwnersTransport):
            return self._send_parts(self._transport, version)
        return self._send_whole(self._transport, version)

    def _send_whole(self, transport: Transport, version: int) -> SyncReport:
        tensors = self._for_engines(self._tensors())
        try:
            return transport.send(tensors, version=version)
        except RuntimeError:
            drain(tensors)  # an engine was lost, but the other ranks' gathers still need this one
            raise

    def _send_parts(self, transport: OwnersTransport, version: int) -> SyncReport:
        parts = self._parts
        check = FiniteCheck(lambda: chain.from_iterable(part.tensors() for part in parts), described=self._description)

        def watched(part: WeightPart) -> Iterator[NamedTensor]:
            return self._for_engines(check.watched(part.tensors()))

        sent = [replace(part, tensors=partial(watched, part)) for part in parts]
        return transport.send_parts(sent, check=check.finish, version=version)

    def _for_engines(self, tensors: Iterator[NamedTensor]) -> Iterator[NamedTensor]:
        if not self._args.engines_on_cpu:
            return tensors
        return ((name, tensor.cpu()) for name, tensor in tensors)  # makes no copy if the trainer is on the CPU, too

    def _description(self) -> str:
        return f"the actor's weights, {self._weights_from}"

    def _tensors(self) -> Iterator[NamedTensor]:
        """Return the actor's whole tensors under their HF names; the stream raises RunError if one is not finite."""
        return finite(self._source.iter_hf_tensors, described=self._description)

    def _prove(self, version: int) -> None:
        directory = Path(self._args.resolved.update_weight_disk_dir) / PROOF
        # Use the dtype in which the weights were sent; the HF directory's own may hold fewer bits.
        self._source.save_hf(directory, dtype=self._source.params_dtype)
        if self._transport.asks_engines:
            try:
                prove_weights(self._transport, directory, version=version)
            finally:
                shutil.rmtree(directory)


def _on_all(arrived: bool) -> bool:
    """Return whether `arrived` is true on all trainers; collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return arrived
    everywhere: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(everywhere, arrived)
    return all(everywhere)
