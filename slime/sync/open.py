"""The one place that chooses how weights reach the engines: the table of transports, and what opens one.

- Used by: `sender.WeightSender`, whenever a trainer is connected to engines.
- Invariant: the rows of TRANSPORTS alone decide which transport a trainer opens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slime.sync.broadcast import BroadcastTransport
from slime.sync.colocate import ColocatedTransport
from slime.sync.disk import DiskTransport
from slime.sync.transport import NullTransport, Opening, Transport


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to send weights: what opens it on a trainer, and where it applies."""

    opens: Callable[[Opening], Transport]
    shared_devices: bool = False
    """Whether it is for engines on the trainers' own devices; otherwise it is for engines that have theirs."""
    every_trainer_sends: bool = False
    """Whether it is opened on every trainer; otherwise on trainer 0, and the others only take part in gathering."""


TRANSPORTS: dict[str, Row] = {
    "broadcast": Row(opens=BroadcastTransport.open),
    "disk": Row(opens=DiskTransport.open),
    "colocate": Row(opens=ColocatedTransport.open, shared_devices=True, every_trainer_sends=True),
}
"""Every transport by its name, as --update-weight-transport names it. "auto" is the first row that applies."""


def open_transport(opening: Opening) -> Transport:
    """Return this trainer's side of the transport that the arguments name. Collective over the trainers.

    A trainer that sends nothing gets a transport that runs through the stream of tensors and drops them.

    Raises:
        ValueError: no transport of that name applies to these engines.
    """
    here = {name: row for name, row in TRANSPORTS.items() if row.shared_devices == bool(opening.shared_with)}
    name = opening.args.update_weight_transport
    row = next(iter(here.values()), None) if name == "auto" else here.get(name)
    if row is None:
        where = "on the trainers' devices" if opening.shared_with else "on devices of their own"
        raise ValueError(
            f"--update-weight-transport {name}: it does not reach engines {where}; use auto, {', '.join(here)}"
        )
    return row.opens(opening) if opening.rank == 0 or row.every_trainer_sends else NullTransport()
