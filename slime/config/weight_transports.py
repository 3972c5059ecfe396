"""The weight transports: one row for each way to send weights to engines, with the facts that rules need.

- Used by: the choices of --update-weight-transport and the rules; `slime.sync.open` opens the class in a row.
- Invariant: rules and plan read these facts and never compare the name of a transport.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TransportFacts:
    """The facts about one transport; the defaults fit engines that have their own devices."""

    transport: str
    """The dotted path of its class, a `slime.sync.transport.Transport`, whose `open` a trainer calls."""
    shared_devices: bool = False
    """Whether it is for engines on the trainers' own devices, as with --colocate; then no user has to choose it."""
    every_trainer_sends: bool = False
    """Whether it is opened on every trainer; otherwise on trainer 0, and the others only take part in gathering."""
    of_parts: str | None = None
    """The class that every trainer opens instead if weights are split over pipeline stages or expert ranks, so that
    each part is sent by its owner; None: trainer 0 gathers all."""
    writes_files: bool = False
    """Whether it writes weights to files in --update-weight-disk-dir."""


TRANSPORTS: Mapping[str, TransportFacts] = {
    "broadcast": TransportFacts(
        transport="slime.sync.broadcast.BroadcastTransport", of_parts="slime.sync.owners.OwnersTransport"
    ),
    "disk": TransportFacts(transport="slime.sync.disk.DiskTransport", writes_files=True),
    "colocate": TransportFacts(
        transport="slime.sync.colocate.ColocatedTransport", shared_devices=True, every_trainer_sends=True
    ),
}
"""Every transport by its name. AUTO is the first row that reaches the run's engines."""

AUTO = "auto"


def reaching(*, shared_devices: bool) -> dict[str, TransportFacts]:
    """Return the rows of transports to engines on the trainers' devices, or to engines that have their own."""
    return {name: row for name, row in TRANSPORTS.items() if row.shared_devices == shared_devices}
