"""Buffer filters take groups out of the data buffer: `f(args, rollout_id, buffer, num_samples)`.

- Called by: `data_buffer`, before a rollout draws new prompts.
- Invariant: a filter changes `buffer` in place, and `num_samples` counts groups. What it returns is no longer in the
  buffer.
"""

from __future__ import annotations

from slime.config.args import Args
from slime.core.sample import Sample


def pop_first(args: Args, rollout_id: int, buffer: list[list[Sample]], num_samples: int) -> list[list[Sample]]:
    """Take the oldest groups first."""
    num_to_pop = min(len(buffer), num_samples)
    samples = buffer[:num_to_pop]
    del buffer[:num_to_pop]
    return samples
