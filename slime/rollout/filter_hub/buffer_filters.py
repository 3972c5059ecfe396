"""How groups are taken out of the data buffer: `f(args, rollout_id, buffer, num_samples)`.

Path: `data_buffer` calls one before a rollout draws new prompts. Invariant: `buffer` is changed in place and
`num_samples` counts groups; what is returned is no longer in the buffer.
"""

from __future__ import annotations

from slime.config.args import Args
from slime.core.sample import Sample


def pop_first(args: Args, rollout_id: int, buffer: list[list[Sample]], num_samples: int) -> list[list[Sample]]:
    """The oldest groups first."""
    num_to_pop = min(len(buffer), num_samples)
    samples = buffer[:num_to_pop]
    del buffer[:num_to_pop]
    return samples
