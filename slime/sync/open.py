"""The one place that chooses how weights reach the engines.

- Used by: `sender.WeightSender`, whenever a trainer is connected to engines.
- Invariant: the rows of `slime.config.weight_transports` alone decide which transport a trainer opens.
"""

from __future__ import annotations

from slime.config.weight_transports import AUTO, reaching
from slime.core.plugins import load_class
from slime.sync.transport import NullTransport, Opening, Transport


def open_transport(opening: Opening) -> Transport:
    """Return this trainer's side of the transport that the arguments name. Collective over the trainers.

    A trainer that sends nothing gets a transport that runs through the stream of tensors and drops them.

    Raises:
        ValueError: no transport of that name applies to these engines, or its row names no Transport.
    """
    here = reaching(shared_devices=bool(opening.shared_with))
    name = opening.args.update_weight_transport
    row = next(iter(here.values()), None) if name == AUTO else here.get(name)
    if row is None:
        where = "on the trainers' devices" if opening.shared_with else "on devices of their own"
        raise ValueError(
            f"--update-weight-transport {name}: it does not reach engines {where}; use auto, {', '.join(here)}"
        )
    path = row.of_parts if opening.parts and row.of_parts else row.transport
    if opening.rank > 0 and not row.every_trainer_sends and path != row.of_parts:
        return NullTransport()
    return load_class(path, Transport, chosen_by=f"--update-weight-transport {name}").open(opening)
