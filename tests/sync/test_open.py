"""A transport is one class and one row of TRANSPORTS, and the trainers that send nothing still take part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest
import torch

from slime.config.args import Args
from slime.config.weight_transports import TRANSPORTS, TransportFacts
from slime.core.weight_parts import WeightPart
from slime.engine.bucket_layout import NamedTensor
from slime.sync.buckets import Buckets
from slime.sync.disk import DiskTransport
from slime.sync.open import open_transport
from slime.sync.sender import WeightSender
from slime.sync.transport import NullTransport, Opening, SyncReport, Transport

URL = "http://127.0.0.1:1"
SENT: dict[str, tuple[int | None, list[torch.Tensor]]] = {}


class Mailbox(Transport):
    """Splits every bucket as an engine would, and keeps its tensors under the bucket's names; it needs no engine."""

    asks_engines = False

    @classmethod
    def open(cls, opening: Opening) -> Mailbox:
        return cls(opening.client(), bucket_bytes=opening.args.update_weight_buffer_size)

    def send(self, tensors: Iterable[NamedTensor], *, version: int) -> SyncReport:
        total = 0
        buckets = Buckets(tensors, self._bucket_bytes)
        for bucket in buckets:
            flat = bucket.layout.flatten(bucket.tensors)
            carried = version if buckets.at_end() else None
            SENT[" ".join(bucket.layout.names)] = (carried, bucket.layout.split(flat))
            total += bucket.layout.num_bytes
        return SyncReport(seconds=2.0, bytes=total)


class Lost(Mailbox):
    """Loses its engine after the first tensor."""

    def send(self, tensors: Iterable[NamedTensor], *, version: int) -> SyncReport:
        next(iter(tensors))
        raise RuntimeError(f"{URL} is gone")


class Weights:
    """A trainer's weights, which count how many of their tensors were gathered."""

    params_dtype = torch.float32

    def __init__(self, weights: Sequence[NamedTensor]) -> None:
        self.weights = weights
        self.gathered = 0

    def iter_hf_tensors(self) -> Iterator[NamedTensor]:
        for each in self.weights:
            self.gathered += 1
            yield each

    def weight_parts(self) -> list[WeightPart]:
        raise AssertionError("the weights are on one rank")

    def save_hf(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        raise AssertionError("the sync is not to be proven")


def weights() -> Weights:
    return Weights([("a", torch.randn(2, 3)), ("b", torch.randn(4).bfloat16()), ("c", torch.randn(5))])


def args_of(transport: str, **options: object) -> Args:
    return Args(
        rollout_engine="embedded",
        rollout_num_gpus=1,
        check_weight_sync=False,
        update_weight_transport=transport,
        update_weight_buffer_size=32,
        **options,
    )


def sender(source: Weights, transport: str, *, rank: int = 0) -> WeightSender:
    made = WeightSender(args_of(transport), source, rank=rank, backend="gloo")
    made.connect(URL, [URL], [1])
    return made


def add_row(monkeypatch: pytest.MonkeyPatch, name: str, kind: type, **facts: bool) -> None:
    rows = cast(dict[str, TransportFacts], TRANSPORTS)
    monkeypatch.setitem(rows, name, TransportFacts(transport=f"{__name__}.{kind.__name__}", **facts))


def test_a_row_makes_a_transport_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    source = weights()
    with pytest.raises(ValueError, match=r"--update-weight-transport mailbox: .* use auto, broadcast, disk"):
        sender(source, "mailbox")
    add_row(monkeypatch, "mailbox", Mailbox)
    SENT.clear()
    made = sender(source, "mailbox")
    assert made.version is None
    assert made.send(4) == SyncReport(seconds=2.0, bytes=24 + 8 + 20).metrics()
    assert made.version == 4
    assert {names: version for names, (version, _) in SENT.items()} == {"a b": None, "c": 4}
    arrived = [tensor for _, tensors in SENT.values() for tensor in tensors]
    for there, (_, here) in zip(arrived, source.weights, strict=True):
        assert there.dtype == here.dtype and torch.equal(there, here)


def test_a_trainer_that_sends_nothing_gathers_all(monkeypatch: pytest.MonkeyPatch) -> None:
    add_row(monkeypatch, "mailbox", Mailbox)
    SENT.clear()
    source = weights()
    assert sender(source, "mailbox", rank=1).send(1) == {}
    assert (source.gathered, SENT) == (3, {})
    add_row(monkeypatch, "mailbox", Mailbox, every_trainer_sends=True)
    assert sender(source, "mailbox", rank=1).send(1) != {} and SENT, "control"
    unconnected = WeightSender(args_of("auto"), source, rank=0, backend="gloo")
    assert unconnected.send(1) == {}, "there are no engines yet"


def test_a_row_without_a_transport_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    add_row(monkeypatch, "weights", Weights)
    with pytest.raises(ValueError, match=r"--update-weight-transport weights: \S+\.Weights is not a Transport"):
        sender(weights(), "weights")


def test_a_lost_engine_leaves_no_trainer_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    add_row(monkeypatch, "lost", Lost)
    source = weights()
    with pytest.raises(RuntimeError, match="is gone"):
        sender(source, "lost").send(1)
    assert source.gathered == 3


def test_files_are_chosen_by_name(tmp_path: Path) -> None:
    def opened(transport: str, *, rank: int = 0, shared: Sequence[Sequence[int]] = (), **options: object) -> Transport:
        opening = Opening(
            args=args_of(transport, hf_checkpoint=str(tmp_path), **options),
            rank=rank,
            dtype=torch.float32,
            backend="gloo",
            router_url=URL,
            engine_urls=[URL],
            engine_ranks=[1],
            shared_with=shared,
        )
        return open_transport(opening)

    assert isinstance(opened("disk", update_weight_disk_dir=str(tmp_path)), DiskTransport)
    assert isinstance(opened("disk", rank=1), NullTransport)
    with pytest.raises(RuntimeError, match="update_weight_disk_dir has no value"):
        opened("disk")
    with pytest.raises(ValueError, match=r"disk: it does not reach engines on the trainers' devices; use auto, colo"):
        opened("disk", shared=[[0]])
