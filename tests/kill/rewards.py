"""The sweep's reward: it depends on every token of a response, and now and then it fails.

Path: --custom-rm-path of the sweep's runs; groups of equal rewards go to the dynamic filter.
"""

from __future__ import annotations

import hashlib

from slime.config.args import Args
from slime.core.sample import Sample


def judge(args: Args, sample: Sample) -> float:
    """0 or 1 by the response tokens.

    Raises:
        ValueError: for one response in sixteen.
    """
    number = hashlib.blake2b(repr(sample.tokens).encode(), digest_size=1).digest()[0]
    if number < 16:
        raise ValueError(f"nothing to say about a response whose digest is {number}")
    return float(number % 2)
