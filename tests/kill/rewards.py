"""The sweep's reward: it depends on every token of a response, and sometimes it fails.

- Used by: --custom-rm-path of the sweep's runs. The dynamic filter drops groups of equal rewards.
"""

from __future__ import annotations

import hashlib

from slime.config.args import Args
from slime.core.sample import Sample


def judge(args: Args, sample: Sample) -> float:
    """Return 0 or 1, decided by the response tokens.

    Raises:
        ValueError: for one response in sixteen.
    """
    number = hashlib.blake2b(repr(sample.tokens).encode(), digest_size=1).digest()[0]
    if number < 16:
        raise ValueError(f"nothing to say about a response whose digest is {number}")
    return float(number % 2)
